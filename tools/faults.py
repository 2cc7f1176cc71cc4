"""Try to break the command line: random commands, damaged files, kills at random moments.

    python tools/faults.py [--seed S] [--commands N] [--files N] [--kills N]

A few minutes on one core. Every try is a process of its own in a fresh copy of a folder with images, a run and weights. It may end well (exit code 0), or be
refused: exit code 2, one line, no traceback, and what lay in the folder still there. Anything else is printed and counted as lost, and the exit code is 1. A
training that is killed must end with the weights of one that was not."""
import argparse, multiprocessing, os, random, shutil, sys, tempfile, time
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import load_file
from draw_nbdev import benchmark, cli, classifier, evaluation, reproduce, training # noqa: F401 (forked processes find them imported)

TRAIN = 'train mnist --images mine --glimpses 2 --hidden-size 8 --latent-size 2 --read-size 1 --batch-size 4 --save-every 3 --epochs 3 --out run'
SECONDS = 60 # After which a try counts as hanging
VALUES = '0', '-1', '1', '2', '1e300', 'nan', 'inf', 'none', '', 'x', '18446744073709551616', '999999999999999999999', '64:1', '2:1,3:1', '2:0', ':', '../..', 'mine', 'nowhere', 'run', 'letters'
VERBS = {
    'train': ('mnist --images mine', ['--glimpses', '--epochs', '--hidden-size', '--latent-size', '--read-size', '--write-size', '--batch-size', '--learning-rate', '--decay', '--clip-norm',
                                      '--average', '--precision', '--optimizer', '--recipe', '--processes', '--seed', '--size', '--out', '--save-every', '--valid-images']),
    'evaluate': ('run --images mine', ['--glimpses', '--limit', '--seeds', '--samples', '--split', '--out', '--size', '--data']),
    'generate': ('run', ['--glimpses', '--count', '--seed', '--out']),
    'classify': ('cluttered_4', ['--split', '--recipe', '--precision', '--processes', '--learning-rate', '--decay']),
    'benchmark': ('', ['--preset', '--batch', '--glimpses', '--side', '--seconds', '--json']),
}
SHAPES = b'', b'{}', b'[]', b'null', b'7', b'"text"', b'[' * 9000, b'{"config": ', b'{"config": null}', b'{"step": null}', b'\xff\xfe\x00', b'{"hidden_size": 1e99}', b'{"glimpses": 99999999999}'

def make(folder):
    "What every try begins with: images, a finished run, somebody's letters"
    chance = np.random.default_rng(0)
    for name in ('mine', 'letters'): (folder / name).mkdir()
    for i in range(20): Image.fromarray((chance.random((6, 9)) * 255).astype(np.uint8)).save(folder / f'mine/{i:02}.png')
    (folder / 'letters/dear.txt').write_text('Dear')
    code, said = finish(start(folder, TRAIN))
    assert code == 0, said

def child(folder, line, said):
    "One command"
    os.chdir(folder)
    with open(said, 'w') as file:
        for stream in (1, 2): os.dup2(file.fileno(), stream)
    sys.argv = ['draw', *line.split()] if isinstance(line, str) else ['draw', *line]
    torch.set_num_threads(1)
    cli.main()

def start(folder, line):
    "Begin a command in a forked process"
    said = folder.parent / f'{folder.name}.said'
    process = multiprocessing.get_context('fork').Process(target=child, args=(folder, line, said))
    process.start()
    process.said = said
    return process

def finish(process):
    "Exit code, None for one that hung, and what was said"
    process.join(SECONDS)
    hung = process.is_alive()
    process.kill()
    process.join()
    return None if hung else process.exitcode, process.said.read_text(errors='replace')

def contents(folder): return {file: file.read_bytes() for file in folder.rglob('*') if file.is_file()}

def verdict(code, said, before, folder):
    "How a try has ended"
    lost = [file for file, was in before.items() if not file.is_file() or code == 2 and file.read_bytes() != was]
    gone = [file for file in lost if not file.is_relative_to(folder / 'run')] # a run removes states of its own
    if code == 0 and 'Traceback' not in said and not gone: return 'ended well'
    errors = [line for line in said.splitlines() if line.startswith('draw: ')]
    if code == 2 and len(errors) == 1 and said.rstrip().endswith(errors[0]) and 'Traceback' not in said and len(errors[0]) < 1500 and not lost: return 'refused with one line'
    return 'lost'

def command(chance):
    "A verb with one to three options, most of them wrong"
    verb = chance.choice(list(VERBS))
    usual, flags = VERBS[verb]
    given = {flag: chance.choice(VALUES) for flag in chance.sample(flags, min(len(flags), chance.randint(1, 3)))}
    if verb == 'train': given = {'--epochs': '1', '--glimpses': '1', '--hidden-size': '4', '--batch-size': '4', '--latent-size': '2', '--out': 'new'} | given
    if verb == 'classify': given = {'--out': 'letters'} | given # which is refused: a training would take too long
    if verb == 'benchmark': given = {'--preset': 'mnits'} | given
    if verb == 'evaluate': given = {'--limit': '4'} | given
    return [verb, *usual.split(), *(word for pair in given.items() for word in pair)]

def damage(folder, chance):
    "One file of the run, cut, changed or replaced; what was done, and a command that meets it"
    files = [file for file in sorted((folder / 'run').rglob('*')) if file.is_file() and 'tensorboard' not in str(file) and file.name != 'run.lock']
    file, how = chance.choice(files), chance.choice(['cut', 'flip', 'replace', 'missing', 'folder'])
    held = bytearray(file.read_bytes())
    if how == 'cut': file.write_bytes(held[:chance.randrange(len(held) + 1)])
    elif how == 'flip' and held:
        held[chance.randrange(len(held))] ^= 1 << chance.randrange(8)
        file.write_bytes(held)
    elif how == 'replace': file.write_bytes(chance.choice(SHAPES))
    else: file.unlink()
    if how == 'folder': file.mkdir()
    line = chance.choice([TRAIN.replace('--epochs 3', '--epochs 4'), 'generate run --count 2 --out pictures', 'evaluate run --images mine --limit 4'])
    return f'{file.relative_to(folder)} {how}', line

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, usual in (('seed', 0), ('commands', 100), ('files', 100), ('kills', 10)): parser.add_argument(f'--{name}', type=int, default=usual)
    arguments = parser.parse_args()
    chance, rows = random.Random(arguments.seed), []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        base, folder = Path(place) / 'base', Path(place) / 'here'
        base.mkdir()
        make(base)
        for kind, count in (('commands', arguments.commands), ('damaged files', arguments.files)):
            for _ in range(count):
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(base, folder)
                what, line = ('', command(chance)) if kind == 'commands' else damage(folder, chance)
                before = contents(folder)
                code, said = finish(start(folder, line))
                rows.append((kind, verdict(code, said, before, folder)))
                if rows[-1][1] == 'lost': print(f'--- {what} $ draw {line if isinstance(line, str) else " ".join(line)}\nexit code {code}\n{said[-800:]}', flush=True)
        whole = load_file(next((base / 'run').glob('state-*')) / 'model.safetensors')
        for _ in range(arguments.kills):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(base, folder, ignore=lambda path, names: ['run'] if Path(path) == base else [])
            process = start(folder, TRAIN)
            time.sleep(chance.uniform(0.1, 3))
            process.kill()
            finish(process)
            code, said = finish(start(folder, TRAIN))
            again = load_file(next((folder / 'run').glob('state-*')) / 'model.safetensors') if code == 0 else {}
            same = again.keys() == whole.keys() and all(torch.equal(again[key], whole[key]) for key in whole)
            rows.append(('kills', 'ended well' if same else 'lost'))
            if not same: print(f'--- killed, then exit code {code}\n{said[-800:]}', flush=True)
    table = pd.DataFrame(rows, columns=['kind', 'verdict'])
    counts = pd.crosstab(table.kind, table.verdict).reindex(columns=['ended well', 'refused with one line', 'lost'], fill_value=0)
    counts.insert(0, 'tried', counts.sum(axis=1))
    print(counts.to_string())
    sys.exit(int(counts['lost'].sum() > 0))
