"Packaging: licence and classifiers stand here, everything else in settings.ini"
import shlex
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='])
ini.read('settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
extras = {k.removesuffix('_requirements'): shlex.split(v) for k,v in cfg.items() if k.endswith('_requirements')}
# Links that work in the repository have to be whole ones on a package index
readme = Path('README.md').read_text(encoding='utf-8')
readme = readme.replace('](nbs/images/', f"]({cfg['git_url']}/raw/{cfg['branch']}/nbs/images/").replace('](nbs/', f"]({cfg['git_url']}/blob/{cfg['branch']}/nbs/")
pythons = [f'Programming Language :: Python :: 3.{minor}' for minor in (10, 11, 12, 13)]

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], license='MIT AND CC-BY-SA-3.0', license_files=['LICENSE', 'draw_nbdev/assets/LICENSE-MNIST.txt'], url=cfg['git_url'],
    long_description=readme, long_description_content_type='text/markdown',
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl']},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research', 'Programming Language :: Python :: 3', *pythons],
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']),
    package_data={cfg['lib_path']: ['py.typed', 'assets/*', 'assets/live/*', 'pretrained/*/*']},
    python_requires='>=' + cfg['min_python'],
    install_requires=shlex.split(cfg.get('requirements', '')),
    extras_require=extras,
    entry_points={'console_scripts': shlex.split(cfg.get('console_scripts', '')), 'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
)
