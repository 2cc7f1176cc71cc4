"""Measure loss and gradients of one update on a GPU: results/gpu.json.

    python tools/measure_gpu.py

About a minute and a half, most of it compiling. Both scans, one operation at a time and captured, with and without attention."""
import json, statistics, sys, time
from datetime import date
from pathlib import Path
import torch
from draw_nbdev.files import write_text
from draw_nbdev.graph import Captured
from draw_nbdev.loss import bound
from draw_nbdev.model import DRAW, preset
from draw_nbdev.runs import machine

def milliseconds(update, batch, repeats):
    "Median time of an update, the device waited for"
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        update(batch, 64, {})
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])

def update_of(model):
    "Loss and gradients in bfloat16"
    def learn(batch, glimpses, weights):
        images, noise = batch
        with torch.autocast('cuda', torch.bfloat16, cache_enabled=False): output = model(images, noise)
        total = bound(output, images, model.likelihood).total
        model.zero_grad()
        total.mean().backward()
        return {'bound': total.detach()}
    return learn

if __name__ == '__main__':
    if not torch.cuda.is_available(): sys.exit('this needs a GPU that torch.cuda can use')
    rows = []
    for attention in (True, False):
        config = preset('mnist', attention=attention)
        batch = [torch.rand(100, 1, 28, 28, device='cuda').round(), torch.randn(64, 100, config.latent_size, device='cuda')]
        for scan in ('fused', 'compiled'):
            model = DRAW(config, scan=scan).cuda()
            for captured in (False, True):
                learn = update_of(model)
                taken = milliseconds(Captured(learn) if captured else learn, batch, 20 if captured else 5)
                rows.append(dict(attention=attention, scan=scan, captured=captured, milliseconds=round(taken, 2)))
                print(rows[-1], flush=True)
    measured = {'machine': '; '.join(machine(torch.device('cuda')).values()), 'network': 'mnist, T = 64, batch 100, bfloat16: loss and gradients of one update',
                'date': date.today().isoformat(), 'rows': rows}
    write_text(Path('results/gpu.json'), json.dumps(measured, indent=1) + '\n')
