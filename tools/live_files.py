"""Put the widgets of the site, and the weights and pictures that they load, into a folder.

    python ../tools/live_files.py live

Both builders of the site run this in the folder of processed notebooks, before anything else: see
`pre-render` in nbs/_quarto.yml."""
import sys
from pathlib import Path
from draw_nbdev.demo import live_files

if __name__ == '__main__': live_files(Path(sys.argv[1]))
