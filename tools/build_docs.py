"""Build the site into `_docs` without Quarto: nbdev's own processors, then smalldocs, which is pure Python.

    pip install -e '.[dev,docs]'
    npm pack katex@0.16.11 && mkdir -p _katex && tar xzf katex-0.16.11.tgz -C _katex
    python tools/build_docs.py --katex _katex/package/dist

Quarto (`nbdev_docs`) makes the published site from the same notebooks and the same `_quarto.yml`. This script is for machines without it.
It does three things that smalldocs leaves undone: it names pages as nbdev does, turns links to the published site into links between the
pages, and puts KaTeX beside the pages, so that the site needs no network. Without --katex the formulas stay LaTeX source."""
import argparse, json, re, shutil
from pathlib import Path
import smalldocs.layout, smalldocs.site
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from build_readme import require_package

KATEX = 'site_libs/katex' # Relative to each page: the site is flat
KATEX_FILES = 'katex.min.css', 'katex.min.js', 'contrib/auto-render.min.js', 'fonts'
EXPECTED = 'output-file is not read', 'format commonmark', 'format.html.grid', 'broken link' # Cured here, meant for Quarto, or left to check_links.py

def page_names(
    proc: Path, # Folder of processed notebooks
) -> dict: # Notebook's file name -> the name its page takes, as in {'16_filterbank.ipynb': 'filterbank.ipynb'}
    "The names that nbdev wrote into each notebook as `output-file`, which Quarto honours and smalldocs does not"
    names = {}
    for notebook in sorted(proc.rglob('*.ipynb')):
        front_matter = ''.join(json.loads(notebook.read_text(encoding='utf-8'))['cells'][0]['source'])
        found = re.search(r'^output-file: (.+)\.html$', front_matter, re.MULTILINE)
        if found: names[notebook.name] = found[1] + '.ipynb'
    return names

def rename_pages(
    proc: Path, # Folder of processed notebooks
    base: str, # Address of the published site, ending in a slash
):
    "Give notebooks the names of their pages, there and in every link, and make links to the published site relative"
    names = page_names(proc)
    link = re.compile(r'(\]\((?:\./)?|- |href: )(' + '|'.join(map(re.escape, names)) + ')') # In Markdown, in sidebar.yml
    for file in [*proc.rglob('*.ipynb'), *proc.glob('*.yml')]:
        text = link.sub(lambda found: found[1] + names[found[2]], file.read_text(encoding='utf-8').replace(f']({base}', ']('))
        file.unlink()
        file.with_name(names.get(file.name, file.name)).write_text(text, encoding='utf-8')

def add_katex(
    site: Path, # Folder of finished pages
    katex: Path, # KaTeX's `dist` folder
):
    "Copy the part of KaTeX that the pages load"
    for name in KATEX_FILES:
        source, target = katex/name, site/KATEX/name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir(): shutil.copytree(source, target, ignore=shutil.ignore_patterns('*.ttf', '*.woff'))
        else: shutil.copy(source, target)

def drop_katex(
    site: Path, # Folder of finished pages
):
    "Take the references to KaTeX out of the pages"
    tag = re.compile(rf'\s*(<link[^>]*{KATEX}/[^>]*>|<script[^>]*{KATEX}/[^>]*></script>)')
    for page in site.rglob('*.html'): page.write_text(tag.sub('', page.read_text(encoding='utf-8')), encoding='utf-8')

def build(
    katex: Path = None, # KaTeX's `dist` folder
) -> Path: # Folder of finished pages
    "Build the site"
    cfg = get_config()
    require_package(cfg.lib_name)
    refresh_quarto_yml()
    proc = proc_nbs(n_workers=0, force=True)
    rename_pages(proc, f'{cfg.doc_host}{cfg.doc_baseurl}/')
    smalldocs.layout.KATEX = KATEX
    built = smalldocs.site.build(str(proc), quiet=True)
    for warning in built.warnings:
        if not any(o in warning for o in EXPECTED): print('warning:', warning)
    site = proc/cfg.doc_path.name
    if katex: add_katex(site, katex)
    else:
        drop_katex(site)
        print('Built without KaTeX: formulas are shown as LaTeX source. Name its dist folder with --katex.')
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    shutil.move(site, cfg.doc_path)
    return cfg.doc_path

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Build the site into _docs without Quarto')
    parser.add_argument('--katex', type=Path, help="the dist folder of npm's katex package")
    katex = parser.parse_args().katex
    if katex and not (katex/'katex.min.js').is_file(): parser.error(f'no katex.min.js in {katex}: name the dist folder of the katex package')
    print(f'{build(katex)}/index.html')
