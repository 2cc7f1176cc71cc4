"Settings for all tests"
import os

os.environ.setdefault('MPLBACKEND', 'Agg') # Figures are drawn into memory, wherever the tests run
