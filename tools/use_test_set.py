"""Use the test set for packaged weights, once: adds the test values to results/NAME.json.

    python tools/use_test_set.py NAME      after tools/package.py and tools/record.py

What is measured are the weights that everybody gets, in the precision that they are packaged in. A classifier gets its error; a DRAW network
its bound with 5 seeds and 50 importance samples, and on the fixed binarisation also with 500, on the first 1,000 images.
Weights are chosen on validation images; after this nothing is chosen any more."""
import argparse, json
from dataclasses import asdict
from pathlib import Path
import torch
from draw_nbdev.classifier import classification_error, load_classifier
from draw_nbdev.data_sets import find
from draw_nbdev.evaluation import evaluate
from draw_nbdev.files import write_text
from draw_nbdev.loading import PRETRAINED
from draw_nbdev.model import DRAW
from draw_nbdev.runs import machine

FEW, MANY = 50, 500 # Importance samples for all images, and for the first ones
FIRST = 1000 # Images that are evaluated with many

def tested(
    result: dict, # As tools/record.py wrote it
    test_set, # Images
) -> dict: # What is to be added to the result
    "Test values of the packaged weights; raises `ValueError` where they come from another run"
    name, score = result['name'], 'error' if 'valid_error' in result else 'bound'
    training = json.loads((PRETRAINED / name / 'training.json').read_text(encoding='utf-8'))
    if any(training[key] != result[key] for key in ('options', 'epochs', f'valid_{score}')):
        raise ValueError(f'the packaged {name} and results/{name}.json come from different runs: package the one that was recorded')
    if score == 'error':
        test = classification_error(load_classifier(name), test_set)
        return {'test_error': test.error, 'test_error_se': test.error_se, 'test_images': test.images, 'test': asdict(test)}
    model = DRAW.from_pretrained(name)
    test = evaluate(model, test_set, seeds=5, samples=FEW)
    first = [evaluate(model, test_set, seeds=5, samples=samples, limit=FIRST) for samples in (FEW, MANY)] if test_set.name == 'mnist_fixed' else []
    return {'test_bound': test.bound, 'test_bound_se': test.bound_se, 'test_bound_spread': test.bound_spread,
            'iw_bound': test.iw_bound, 'iw_bound_se': test.iw_bound_se, 'iw_k': FEW, 'test': asdict(test), 'test_first': [asdict(part) for part in first]}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('name')
    file = Path('results') / f'{parser.parse_args().name}.json'
    if not file.is_file(): parser.error(f'there is no {file}: tools/record.py writes it')
    result = json.loads(file.read_text(encoding='utf-8'))
    if 'test' in result: parser.error(f'{file} has its test values: they are measured once, and tools/again.py compares')
    test_set = find(result['data'], 'test')
    result['checksums']['test'] = test_set.checksum
    made = tested(result, test_set) | {'tested_on': machine(torch.device('cpu'))}
    write_text(file, json.dumps(result | made, indent=1) + '\n')
    print(file)
