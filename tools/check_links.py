"""Fail when a page links to a file or an anchor that is not there.

    python tools/check_links.py FOLDER [--base ADDRESS]

Looks at every href and src of every HTML page below FOLDER. Links to other sites are left alone; those that start with ADDRESS, where the
folder is published, are looked up in the folder."""
import argparse, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

class Page(HTMLParser):
    "The links and the anchors of one page"
    def __init__(self, text):
        super().__init__()
        self.links,self.anchors = [],{'', 'top'}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name,value in attributes:
            if name in ('href', 'src') and value is not None and tag != 'base': self.links.append(value)
            elif name == 'id' or (name == 'name' and tag == 'a'): self.anchors.add(value)

def broken_links(
    folder: Path, # A site
    base: str = None, # Address at which it is published
) -> tuple: # Links looked at, and a line for each broken one
    "Look up every link that stays inside `folder`"
    folder = folder.resolve()
    pages = {file: Page(file.read_text(encoding='utf-8')) for file in sorted(folder.rglob('*.html'))}
    count,broken = 0,[]
    for file,page in pages.items():
        for link in page.links:
            parts = urlsplit('/' + link.removeprefix(base).lstrip('/') if base and link.startswith(base) else link)
            if parts.scheme or parts.netloc: continue
            count += 1
            path = unquote(parts.path)
            target = (folder/path.lstrip('/') if path.startswith('/') else file.parent/path).resolve() if path else file
            if target.is_dir(): target = target/'index.html'
            if not target.is_relative_to(folder) or not target.is_file(): problem = 'no such file'
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors: problem = 'no such anchor'
            else: continue
            broken.append(f'{file.relative_to(folder)}: {link}: {problem}')
    return count,broken

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Check the links between the pages of a folder')
    parser.add_argument('folder', type=Path)
    parser.add_argument('--base', help='address at which the folder is published')
    args = parser.parse_args()
    if not any(args.folder.rglob('*.html')): sys.exit(f'no pages in {args.folder}')
    count,broken = broken_links(args.folder, args.base)
    print('\n'.join(broken) or f'{count} links between pages, none broken.')
    sys.exit(bool(broken))
