"""Measure the fused scan on an idle machine: results/benchmark.json.

    python tools/measure_speed.py

About ten minutes. Runs `draw benchmark` for MNIST at every T and batch, for the other presets and for several image sides, and puts the rows into one file
together with what they were measured on."""
import json, subprocess, sys, tempfile
from pathlib import Path
import torch
from draw_nbdev.files import write_text
from draw_nbdev.runs import machine

RUNS = (
    ['--seconds', '24'],
    ['--preset', 'svhn', '--preset', 'cifar10', '--preset', 'two_digits', '--batch', '100', '--glimpses', '16', '--attention', '--seconds', '12'],
    ['--batch', '100', '--glimpses', '16', '--attention', '--seconds', '8', *(text for side in (14, 42, 56, 84) for text in ('--side', str(side)))],
    ['--batch', '25', '--batch', '50', '--batch', '200', '--glimpses', '16', '--attention', '--seconds', '8'],
)

if __name__ == '__main__':
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, options in enumerate(RUNS):
            file = Path(folder) / f'{number}.json'
            subprocess.run([sys.executable, '-c', 'from draw_nbdev.cli import main; main()', 'benchmark', '--json', str(file), *options], check=True)
            rows += json.loads(file.read_text())
    out = Path('results/benchmark.json')
    measured = {'machine': '; '.join(machine(torch.device('cpu')).values()), 'rows': rows}
    write_text(out, json.dumps(measured, indent=1) + '\n')
    print(out)
