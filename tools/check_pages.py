"""Open every page of the built site in a browser and fail on what a reader would stumble over.

    pip install playwright
    python tools/check_pages.py [FOLDER] [PAGE...] [--shots FOLDER]

Needs Chromium (or Chrome) and playwright, which needs no driver beside it; says so in one line and
ends well where either is missing. Each page is loaded once and looked at with 1400 and with 400
pixels, in light and in dark. A problem is: a page wider than the screen, a figure, table or formula
wider than the column, an image that does not load, and an error in the console. On the narrow
screen a table or a formula may be wider than the column if it scrolls in a box of its own. --shots
keeps pictures."""
import argparse, itertools, shutil, sys, threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

WIDTHS = 1400, 400 # Of the screen, in pixels
NARROW = 767 # Up to here tables and formulas may scroll, as in nbs/styles.css
THEMES = 'light', 'dark'
SECONDS = 90 # That a page may take to load on a busy machine
BROWSERS = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'
FIND_PROBLEMS = '''
async narrow => {
    await new Promise(requestAnimationFrame) // the new width and theme have been laid out
    const problems = []
    const text = element => (element.alt || element.textContent || '').trim()
    const about = element => text(element).replace(/\\s+/g, ' ').slice(0, 40)
    const screen = document.documentElement.clientWidth, page = document.documentElement.scrollWidth
    if (page > screen + 1) problems.push(`the page is ${page} px wide`)
    const column = document.querySelector('main')
    if (!column) return [...problems, 'no <main>']
    const style = getComputedStyle(column)
    const right = column.getBoundingClientRect().right - parseFloat(style.paddingRight)
    const scrolls = element => {
        for (let box = element; box && box !== column; box = box.parentElement)
            if (['auto', 'scroll'].includes(getComputedStyle(box).overflowX))
                return box.getBoundingClientRect().right <= right + 1
        return false
    }
    const kinds = {
        figure: 'img, svg, video, canvas', table: 'table', formula: '.katex, mjx-container'}
    for (const [kind, selector] of Object.entries(kinds))
        column.querySelectorAll(selector).forEach((element, number) => {
            if (kind === 'figure' && element.closest('.katex')) return // roots and braces are SVG
            const box = element.getBoundingClientRect()
            if (!box.width) return // in a folded cell
            const inside = kind === 'formula' ? 0 : element.scrollWidth - element.clientWidth - 1
            const over = Math.max(box.right - right, inside)
            if (over > 1 && !(narrow && kind !== 'figure' && scrolls(element)))
                problems.push(
                    `${kind} ${number + 1} (${about(element)}) is ${Math.ceil(over)} px too wide`)
        })
    for (const image of document.images)
        if (image.complete && !image.naturalWidth)
            problems.push(`image ${image.src.slice(0, 80)} does not load`)
    return problems
}'''

def find_browser() -> str | None: # Path of the program
    "The first browser of a known name"
    return next(filter(None, map(shutil.which, BROWSERS)), None)

class Quiet(SimpleHTTPRequestHandler):
    "Files, and not a word on the terminal"
    def log_message(self, *args): pass

def serve(
    folder: Path, # The site
) -> str: # Its address
    "Give out the site on this machine: browsers load no modules from files"
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f'http://127.0.0.1:{server.server_port}'

def problems_of(
    page, # Playwright's page
    address: str, # Of the page
    shots: Path | None, # Folder for pictures
    name: str, # Of the pictures
) -> dict: # Problem -> the views that have it
    "Load a page and look at it in every view"
    found, errors = {}, []
    def hear(message):
        if message.type == 'error': errors.append(f'console: {message.text[:160]}')
    def crash(error): errors.append(f'script: {str(error)[:160]}')
    page.on('console', hear)
    page.on('pageerror', crash)
    page.goto(address, wait_until='load')
    page.evaluate('document.fonts.ready')
    for width, theme in itertools.product(WIDTHS, THEMES):
        page.emulate_media(color_scheme=theme)
        page.set_viewport_size(dict(width=width, height=900))
        seen = page.evaluate(FIND_PROBLEMS, width <= NARROW)
        for problem in seen + errors: found.setdefault(problem, []).append(f'{width} {theme}')
        errors.clear()
        if shots:
            shots.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=shots/f'{name}-{width}-{theme}.png', full_page=True)
    page.remove_listener('console', hear)
    page.remove_listener('pageerror', crash)
    return found

def check(
    playwright, # Playwright's entry
    browser: str, # Path of the program
    folder: Path, # The site
    files: list[Path], # Pages in it
    shots: Path | None, # Folder for pictures
) -> dict: # (page, problem) -> the views that have it
    "Look at every page in every view"
    found = {}
    chromium = playwright.chromium.launch(executable_path=browser, args=['--no-sandbox'])
    page = chromium.new_page()
    page.set_default_timeout(SECONDS * 1000)
    site = serve(folder)
    for file in files:
        address = f'{site}/{file.relative_to(folder).as_posix()}'
        for problem, views in problems_of(page, address, shots, file.stem).items():
            found[file.name, problem] = views
    chromium.close()
    return found

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Look at the pages of a site in a browser')
    parser.add_argument('folder', type=Path, nargs='?', default=Path('_docs'))
    parser.add_argument('pages', nargs='*', help='names of pages (default: all)')
    parser.add_argument('--shots', type=Path, help='folder for pictures of the pages')
    args = parser.parse_args()
    files = [args.folder/f'{Path(name).stem}.html' for name in args.pages]
    files = files or sorted(args.folder.rglob('*.html'))
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files: parser.error(f'no page {", ".join(missing) or args.folder}')
    browser = find_browser()
    try: from playwright.sync_api import sync_playwright
    except ImportError: sync_playwright = None
    if not browser or not sync_playwright:
        missing = 'playwright' if browser else 'Chromium'
        print(f'NOT CHECKED: the pages need {missing} to be looked at.')
        sys.exit()
    with sync_playwright() as playwright: found = check(playwright, browser, args.folder, files, args.shots)
    for (name, problem), views in found.items(): print(f'{name}: {problem} [{", ".join(views)}]')
    views = len(files) * len(WIDTHS) * len(THEMES)
    print(f'{len(files)} pages in {views} views, {len(found)} problems.')
    sys.exit(bool(found))
