"Write requirements.lock: the exact versions, in this environment, of all that settings.ini asks for, and of what that needs."
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name as canonical

root = Path(__file__).parent.parent
HEADER = '''# The exact versions behind the committed numbers, written by `make lock`; settings.ini has the ranges.
# torch is named without its build (CPU or CUDA); pip takes the one that its index offers for the machine.
'''

config = ConfigParser()
config.read(root/'settings.ini', encoding='utf-8')

def requirements(): # list of str: the requirements of settings.ini, for use and for development
    return (config['DEFAULT']['requirements'] + ' ' + config['DEFAULT']['dev_requirements']).split()

def closure(names): # dict canonical name → version of all that `names` need here, themselves included
    todo, done, versions = [Requirement(n) for n in names], set(), {}
    while todo:
        req = todo.pop()
        for extra in req.extras | {''}:
            if (key := (canonical(req.name), extra)) in done: continue
            done.add(key)
            dist = distribution(req.name)
            versions[key[0]] = dist.version.split('+')[0]
            needs = map(Requirement, dist.requires or [])
            todo += [r for r in needs if r.marker is None or r.marker.evaluate({'extra': extra})]
    return versions

if __name__ == '__main__':
    pins = closure(requirements())
    for build_tool in ('pip', 'setuptools', 'wheel'): pins.pop(build_tool, None)
    lowest = config['DEFAULT']['min_python'] + '.0' # some releases need a later patch of it than distributions have
    late = [n for n in pins if not SpecifierSet(distribution(n).metadata['Requires-Python'] or '').contains(lowest)]
    if late: raise SystemExit(f"Python {lowest} cannot install {', '.join(f'{n}=={pins[n]}' for n in late)}: install an older release here and run make lock again")
    (root/'requirements.lock').write_text(HEADER + ''.join(f'{n}=={v}\n' for n, v in sorted(pins.items())))
    print(f'requirements.lock: {len(pins)} packages')
