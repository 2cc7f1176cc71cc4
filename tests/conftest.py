"Settings for all tests"
import os

os.environ.setdefault('MPLBACKEND', 'Agg') # Figures are drawn into memory, wherever the tests run
# Small tensors: more threads only wait for each other, the more so beside other processes
os.environ.setdefault('OMP_NUM_THREADS', '1')
