"""Make the folder of a run from packaged weights, so that the command in results/NAME.json goes on from there with more epochs.

    python tools/unpack.py NAME RUN        then the command of results/NAME.json with a larger number of epochs and --out RUN

The package holds the averaged weights, the curve and the options of a run. Training goes on from the averaged weights; Adam's moments are not
packaged and begin at zero. RUN/unpacked.json says so, and tools/record.py copies it into the result."""
import argparse, json
from pathlib import Path
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel
from draw_nbdev.files import sha256, write_json, write_text
from draw_nbdev.loading import PRETRAINED
from draw_nbdev.model import DRAW
from draw_nbdev.options import TrainOptions
from draw_nbdev.checkpoints import save_state, save_weights
from draw_nbdev.training import Task

def unpack(
    name: str, # Of packaged weights of a DRAW network
    run: Path, # Folder to make; raises `ValueError` if it holds something
):
    "What `train` finds where it has been interrupted"
    model = DRAW.from_pretrained(name)
    history = json.loads((PRETRAINED / name / 'training.json').read_text(encoding='utf-8'))
    del history['half_precision']
    if run.exists(): raise ValueError(f'{run} exists: choose another folder')
    names = 'config', 'options', 'version', 'data', 'task', 'segments'
    write_json(run / 'run.json', {key: history[key] for key in names if key in history})
    curve = (PRETRAINED / name / 'metrics.jsonl').read_text(encoding='utf-8')
    write_text(run / 'metrics.jsonl', curve)
    save_weights(model, run / 'best', history)
    unpacked = {'weights': name, 'epochs': history['epochs'], 'sha256': sha256(PRETRAINED / name / 'model.safetensors')}
    result = Path(f'results/{name}.json')
    if result.is_file(): unpacked['hardware'] = json.loads(result.read_text(encoding='utf-8'))['hardware'] # of the epochs so far
    write_text(run / 'unpacked.json', json.dumps(unpacked, indent=1) + '\n')

    accelerator = Accelerator(cpu=True)
    averaged = AveragedModel(model)
    accelerator.prepare(model, *Task().optimizers(model, TrainOptions(**history['options'])))
    step = next(row['step'] for row in map(json.loads, curve.splitlines()) if row['split'] == 'valid' and row['epoch'] + 1 == history['epochs'])
    averaged.n_averaged.fill_(step) # so that the next update is averaged, where a first one would be copied
    save_state(accelerator, averaged, {'step': step, 'best': history['valid_bound'], 'best_glimpses': history['glimpses'],
                                       **{key: history[key] for key in ('seconds', 'cpu_seconds')}}, run)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('name')
    parser.add_argument('run', type=Path)
    arguments = parser.parse_args()
    try: unpack(arguments.name, arguments.run)
    except (ValueError, OSError) as error: parser.error(str(error))
