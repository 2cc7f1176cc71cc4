"""Write a model card for every packaged network: draw_nbdev/pretrained/NAME/README.md.

    python tools/cards.py

Everything on a card is read from the folder's training.json and from results/NAME.json. Run it after tools/package.py and after tools/use_test_set.py."""
import json
from pathlib import Path
from huggingface_hub import ModelCardData
from draw_nbdev.checkpoints import machines_of, tell_time
from draw_nbdev.classifier import network_class
from draw_nbdev.demo import BINARY
from draw_nbdev.files import write_text
from draw_nbdev.loading import PRETRAINED

RESULTS = Path(__file__).parent.parent / 'results'
KINDS = {'bound': ('bound on -log p(x), nats per image', 1, ''), 'error': ('error, %', 100, ' %')}
COST = 'cost, nats per image (intensities taken for probabilities: no bound on -log p(x))' # Of grey and colour images

def card(
    name: str, # Of packaged weights
) -> str: # Markdown with front matter, as the Hugging Face Hub reads it
    "What the network is, what it learned from, and what it reached"
    history = json.loads((PRETRAINED / name / 'training.json').read_text(encoding='utf-8'))
    file = RESULTS / f'{name}.json'
    result = json.loads(file.read_text(encoding='utf-8')) if file.is_file() else {}
    kind = 'error' if 'valid_error' in history else 'bound'
    measure, factor, unit = KINDS[kind]
    if kind == 'bound' and history['data']['name'] not in BINARY: measure = COST
    network = network_class(name).__name__
    front = ModelCardData(license='mit', library_name='draw_nbdev', tags=['draw', 'attention', 'pytorch'], datasets=['mnist'] if 'mnist' in history['data']['name'] else None,
                          pipeline_tag='unconditional-image-generation' if network == 'DRAW' else 'image-classification')
    home = 'model' if network == 'DRAW' else 'classifier'
    rows = [f'| validation | {factor * history[f"valid_{kind}"]:.2f}{unit} |']
    if f'test_{kind}' in result: rows.append(f'| test | {factor * result[f"test_{kind}"]:.2f} ± {factor * result[f"test_{kind}_se"]:.2f}{unit} |')
    elif result: rows.append('| test | not used yet |')
    time = tell_time(history['seconds'] / 3600, history['cpu_seconds'] / 3600, machines_of(history))
    again = f'; the nearest command is `{result["command"]}`' if result else ''
    if len(history.get('segments', [])) > 1: again += ', though these weights were not made in one go (training.json has the segments)'
    sizes = ', '.join(f'{key} {value}' for key, value in history['config'].items() if value is not None)
    return f"""---
{front.to_yaml()}
---

# {name}

A network of [DRAW, a recurrent neural network for image generation](https://arxiv.org/abs/1502.04623), trained with draw_nbdev {history["version"]}.

```python
from draw_nbdev.{home} import {network}
network = {network}.from_pretrained('{name}')
```

| split | {measure} |
|---|---|
{chr(10).join(rows)}

- **Network**: {sizes}.
- **Data**: {history["data"]["name"]}: {history["data"]["note"]}. Checksum of the training images: {history["data"]["train"]}.
- **Training**: {history["epochs"]} epochs, {time}, seed {history["options"]["seed"]}{again}.
- **Precision of the stored weights**: {"half" if history["half_precision"]["used"] else "single"}.
"""

if __name__ == '__main__':
    for folder in sorted(PRETRAINED.iterdir()):
        write_text(folder / 'README.md', card(folder.name))
        print(folder / 'README.md')
