"Settings for all tests"
import os
import pytest

os.environ.setdefault('MPLBACKEND', 'Agg') # Figures are drawn into memory, wherever the tests run
# Small tensors: more threads only wait for each other, the more so beside other processes
os.environ.setdefault('OMP_NUM_THREADS', '1')
# A GPU computes other last digits: only test_graph.py asks for one, in a process of its own
if 'DRAW_TEST_GPU' not in os.environ: os.environ['CUDA_VISIBLE_DEVICES'] = ''

@pytest.fixture
def fused_calls(monkeypatch):
    "One entry for every pass that `DRAW.forward` hands to the scan"
    import draw_nbdev.model as model # here, after the settings above
    calls, fused_scan = [], model.fused_scan
    def counted(*arguments):
        calls.append(None)
        return fused_scan(*arguments)
    monkeypatch.setattr(model, 'fused_scan', counted)
    return calls
