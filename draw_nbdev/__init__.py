__version__ = "0.1.0"

# What most programs use, by one name. Each is imported when it is first asked for: importing the package itself takes no time.
_homes = {'DRAW': 'model', 'DRAWConfig': 'model', 'preset': 'model', 'bound': 'loss', 'importance_weighted_bound': 'loss',
          'evaluate': 'evaluation', 'find': 'data_sets', 'TrainOptions': 'options', 'recipe': 'options', 'train': 'training'}
__all__ = list(_homes)

def __getattr__(name):
    if name not in _homes: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    return getattr(import_module(f'{__name__}.{_homes[name]}'), name)

def __dir__(): return sorted([*globals(), *_homes])
