"The rules that hold for the repository as a whole."
import ast, json, os, re, shutil, subprocess, sys
from configparser import ConfigParser
from hashlib import sha256
from importlib.metadata import metadata, packages_distributions, version
from pathlib import Path

import nbformat, pandas as pd, papermill, pyarrow.parquet as pq, pytest, yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name as canonical

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/'tools'))
from readme import readme # noqa: E402

NOTEBOOKS = sorted((ROOT/'nbs').glob('[!_.]*.ipynb'))
EXPERIMENTS = [p for p in NOTEBOOKS if re.match(r'[2-7]\d_', p.name)]
MODULES = sorted(f'megl.{p.stem}' for p in (ROOT/'megl').glob('[!_]*.py'))
SETTINGS = ConfigParser()
SETTINGS.read(ROOT/'settings.ini', encoding='utf-8')
SETTINGS = SETTINGS['DEFAULT']
by_name = dict(ids=lambda p: p.stem)

def tree():
    "The repository's files: tracked, or new and not ignored. Without git (an unpacked archive) the folders that it consists of."
    git = subprocess.run(['git', 'ls-files', '-coz', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if git.returncode == 0: found = {ROOT/f for f in git.stdout.split('\0') if f}
    else: found = {*ROOT.glob('*'), *(p for d in ('nbs', 'megl', 'tests', 'tools', '.ci', '.github') for p in (ROOT/d).rglob('*'))}
    return sorted(p for p in found if p.is_file() and p.suffix != '.pyc')

def command(name, cwd, *args):
    "Run a command of this environment; its output is shown if it fails."
    run = subprocess.run([Path(sys.executable).with_name(name), *args], cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout

def contents(folder, pattern): return {p.name: p.read_text(encoding='utf-8') for p in folder.glob(pattern)}

def differing(a, b): return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))

@pytest.fixture
def copy(tmp_path):
    "A copy of the repository, to try commands on."
    for p in tree():
        if (part := p.relative_to(ROOT)).parts[0] not in ('results', 'data'):
            (tmp_path/part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(p, tmp_path/part)
    return tmp_path

# ---- notebooks and what is generated from them

def test_megl_is_what_the_notebooks_export(copy):
    shutil.rmtree(copy/'megl')
    command('nbdev_export', copy)
    assert not differing(contents(ROOT/'megl', '*.py'), contents(copy/'megl', '*.py')), 'run nbdev_export'

def test_nbdev_clean_changes_nothing(copy):
    command('nbdev_clean', copy)
    assert not differing(contents(ROOT/'nbs', '*.ipynb'), contents(copy/'nbs', '*.ipynb')), 'run nbdev_clean'

def test_readme_is_the_front_page():
    assert (ROOT/'README.md').read_text(encoding='utf-8') == readme(), 'run make readme'

def test_links_of_the_readme_lead_somewhere():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    links = re.findall(r'\]\(([^)#]+)\)|(?:src|href)="([^"#]+)"', text)
    missing = [a + b for a, b in links if ':' not in a + b and not (ROOT/(a + b)).exists()]
    assert links and not missing, missing

@pytest.mark.parametrize('path', NOTEBOOKS, **by_name)
def test_form_of_a_notebook(path):
    nb = nbformat.read(path, as_version=4)
    assert nb.metadata.kernelspec.name == 'python3'
    first = next(c.source for c in nb.cells if c.cell_type == 'markdown')
    assert re.match(r'# \S.*\n+> \S', first), 'the first text is an H1 and a > line'
    outputs = [o for c in nb.cells for o in c.get('outputs', [])]
    assert outputs, 'notebooks are committed with their outputs'
    assert not [o for o in outputs if o.output_type == 'error'], 'an error is among the outputs'
    assert not [o for o in outputs if 'command not found' in str(o.get('text', ''))], 'executed without the environment on PATH'

PARAMETERS = 'preset dataset methods seeds epochs device out_dir force'.split()

@pytest.mark.parametrize('path', EXPERIMENTS, **by_name)
def test_parameters_of_an_experiment(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if 'parameters' in c.metadata.get('tags', [])]
    assert len(cells) == 1, f'{len(cells)} cells have the tag parameters'
    lines = [line for line in cells[0].source.splitlines() if line.strip()]
    for line in lines: # papermill reads the cell line by line; a second `=`, even in a comment, confuses it
        assert re.fullmatch(r'\w+( *: *[\w.\[\], ]+)? = [^=]+?# *[^=]+', line), f'not `name = value # help`: {line}'
    assigned = [ast.unparse(s.target if isinstance(s, ast.AnnAssign) else s.targets[0]) for s in ast.parse(cells[0].source).body]
    for statement in ast.parse(cells[0].source).body: ast.literal_eval(statement.value) # plain values, nothing derived
    common = [p for p in PARAMETERS if p in assigned]
    assert assigned[:len(common)] == common and 'out_dir' in common, f'first of all {PARAMETERS}, in this order: {assigned}'
    shown = papermill.inspect_notebook(path) # what `papermill --help-notebook` prints
    assert list(shown) == assigned and all(p['help'].strip() for p in shown.values()), shown

def test_there_are_experiments_and_modules():
    assert EXPERIMENTS and len(MODULES) >= 12, (EXPERIMENTS, MODULES)

def test_lint():
    command('ruff', ROOT, 'check', '--no-cache', 'megl', 'nbs', 'tests', 'tools', 'setup.py')

# ---- imports

IMPORT = '''
import json, os, socket, sys, time
def refuse(*args, **kwargs): raise OSError('importing needs a network')
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import torch
for name in sys.argv[1:]: # each in a process of its own, forked so that torch is imported once
    if os.fork(): os.wait(); continue
    start, error = time.perf_counter(), None
    try: __import__(name)
    except BaseException as e: error = repr(e)
    print(json.dumps([name, error, time.perf_counter() - start, 'transformers' in sys.modules or 'peft' in sys.modules]), flush=True)
    os._exit(0)
'''

@pytest.fixture(scope='module')
def imports(tmp_path_factory):
    "What importing megl and each of its modules does, without Java, GPU and network."
    empty = tmp_path_factory.mktemp('empty')
    env = {k: v for k, v in os.environ.items() if k != 'JAVA_HOME'} | dict(
        PATH=str(empty), HF_HOME=str(empty), HF_HUB_OFFLINE='1', CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')
    run = subprocess.run([sys.executable, '-c', IMPORT, 'megl', *MODULES], cwd=ROOT, env=env, capture_output=True, text=True)
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('["megl')]
    assert len(lines) == 1 + len(MODULES), run.stdout + run.stderr
    return {name: dict(error=error, seconds=seconds, llm=llm) for name, error, seconds, llm in lines}

def test_importing_a_module_needs_no_java_gpu_or_network(imports):
    assert not {name: i['error'] for name, i in imports.items() if i['error']}

def test_import_megl_is_fast(imports): assert imports['megl']['seconds'] < 1

def test_the_classifier_needs_no_language_model(imports):
    assert not [m for m in ('data', 'classifiers', 'saliency', 'losses') if imports[f'megl.{m}']['llm']]

# ---- requirements, versions

REQUIREMENTS = [Requirement(r) for r in SETTINGS['requirements'].split()]
DEVELOPMENT = [Requirement(r) for r in SETTINGS['dev_requirements'].split()]

def test_the_lock_pins_what_settings_ask_for():
    lock = [Requirement(line) for line in (ROOT/'requirements.lock').read_text().splitlines() if line and line[0] != '#']
    pins = {canonical(r.name): str(r.specifier) for r in lock}
    assert len(pins) == len(lock) and all(re.fullmatch(r'==[\w.]+', v) for v in pins.values())
    unmet = [str(r) for r in REQUIREMENTS + DEVELOPMENT if not r.specifier.contains(pins.get(canonical(r.name), '==none')[2:] , True)]
    assert not unmet, f'run make lock: {unmet}'
    late = [n for n in pins if not SpecifierSet(metadata(n)['Requires-Python'] or '').contains(SETTINGS['min_python'] + '.0')]
    assert not late, f'the lowest Python of settings.ini cannot install {late}'

def test_conda_takes_python_packages_from_settings():
    *conda, pip = yaml.safe_load((ROOT/'environment.yml').read_text())['dependencies']
    assert pip == {'pip': ['-e .[dev]']}
    names = {re.split(r'[ <>=]', c)[0] for c in conda}
    assert names == {'python', 'pip', 'git', 'make', 'openjdk', 'quarto'}
    assert f"python >={SETTINGS['min_python']}" in conda[0]

def test_versions_agree():
    import megl
    v = SETTINGS['version']
    assert megl.__version__ == v == version('megl') == yaml.safe_load((ROOT/'CITATION.cff').read_text())['version']
    assert f'[{v}]' in (ROOT/'CHANGELOG.md').read_text()

def imported(source):
    "The packages that a piece of code imports; IPython's own syntax is skipped."
    code = '\n'.join(line for line in source.splitlines() if not re.match(r'\s*[%!]', line))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import): yield from (a.name.split('.')[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level: yield node.module.split('.')[0]

def undeclared(sources, requirements):
    known, declared = packages_distributions(), {canonical(r.name) for r in requirements}
    packages = {p for s in sources for p in imported(s)} - set(sys.stdlib_module_names) - {'megl', 'readme'}
    return sorted(p for p in packages if not declared & {canonical(d) for d in known.get(p, [p])})

OPTIONAL = {'onnxscript'} # imported by one function, whose error says what to install

def test_settings_name_what_is_imported():
    modules, others = ([p.read_text(encoding='utf-8') for d in folders for p in (ROOT/d).glob('*.py')]
                       for folders in (['megl'], ['tests', 'tools']))
    notebooks = [c.source for p in NOTEBOOKS for c in nbformat.read(p, as_version=4).cells if c.cell_type == 'code']
    needed = [p for p in undeclared(modules, REQUIREMENTS) if p not in OPTIONAL], undeclared(others + notebooks, REQUIREMENTS + DEVELOPMENT)
    assert needed == ([], []), f'not in requirements, not in dev_requirements: {needed}'

# ---- presets

def stated(path): # what a file of parameters says about its preset: name → value, as text
    return dict(re.findall(r'^#   ([a-z_.]+) = (.+?)(?: {2,}|$)', path.read_text(encoding='utf-8'), re.M))

def spelled(preset, name): # the same of the preset itself
    if name == 'lora': return ', '.join(f"{k.removeprefix('lora_')} {v:g}" for k, v in preset.lora)
    if name == 'base': return preset.base if isinstance(preset.base, str) else ' and '.join(preset.base.values())
    if name == 'backbones': return ', '.join(preset.backbones)
    if name.startswith('generator.'): return str(dict(dict(dtype='float32', checkpointing=False), **dict(preset.generator))[name[10:]]).lower()
    value = getattr(preset.train, name[6:]) if name.startswith('train.') else getattr(preset, name)
    return str(value).lower() if isinstance(value, bool) else value

@pytest.mark.parametrize('name', ['photos', 'paper'])
def test_reasons_are_given_for_the_values_that_a_preset_has(name):
    from megl.run import PRESETS
    told = stated(ROOT/'nbs'/'params'/f'{name}.yaml'); assert len(told) >= 12
    differ = {k: (v, own) for k, v in told.items() if (own := spelled(PRESETS[name], k)) != v and not (isinstance(own, (int, float)) and float(v) == own)}
    assert not differ, differ
    from dataclasses import fields
    unsaid = [f.name for f in fields(PRESETS[name].train) if getattr(PRESETS[name].train, f.name) != f.default and f'train.{f.name}' not in told]
    assert not unsaid, f'no reason is given for {unsaid}'

def test_the_demo_has_the_rates_and_weights_that_tuning_chose():
    import csv
    from megl.run import TUNED
    with open(ROOT/'results'/'tables'/'tuning_choice.csv', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    chosen = {(r.pop('backbone'), r.pop('method')): {k: float(v) for k, v in r.items() if v} for r in rows}
    assert chosen == TUNED

@pytest.mark.parametrize('path', sorted((ROOT/'nbs'/'params').glob('[!a]*.yaml')), **by_name)
def test_files_of_parameters_fit_the_tables(path):
    given = yaml.safe_load(path.read_text(encoding='utf-8'))
    for nb in ('21_table2', '22_table3', '23_table4'):
        known = papermill.inspect_notebook(ROOT/'nbs'/f'{nb}.ipynb')
        assert not [k for k in given if k not in known], nb
        assert given['preset'] == path.stem and path.stem in known['preset']['help'], nb

# ---- what is committed

def test_no_paths_of_one_machine():
    path = re.compile(r'(?<![\w.\]])/(?:home|root|Users|work|tmp|private)/\w[^\s"\']*|[A-Z]:\\+Users')
    found = []
    for p in tree():
        try: lines = p.read_text(encoding='utf-8').splitlines()
        except UnicodeDecodeError: continue
        for line in lines:
            if len(line) < 2000 and (m := path.search(line)): found.append(f'{p.relative_to(ROOT)}: {m[0]}') # longer: images
    assert not found, '\n'.join(found)

def test_results_are_small():
    size = sum(p.stat().st_size for p in tree() if p.is_relative_to(ROOT/'results'))
    assert size < 30e6, f'results/ has {size/1e6:.0f} MB'

def test_results_are_those_of_the_manifest():
    manifest = ROOT/'results'/'manifest.jsonl'
    if not manifest.exists(): pytest.skip('no results yet')
    outputs = {}
    for line in manifest.read_text(encoding='utf-8').splitlines(): outputs |= json.loads(line)['outputs'] # the latest run counts
    wrong = [f for f, digest in outputs.items() if not (ROOT/f).exists() or sha256((ROOT/f).read_bytes()).hexdigest() != digest]
    assert outputs and not wrong, wrong

def test_committed_numbers_are_of_kept_predictions():
    "Tables that share rows rest on the same runs: every run id stands in a file of predictions. Tuning has scores alone."
    if subprocess.run(['git', 'diff', '--quiet', 'HEAD', '--', 'results'], cwd=ROOT, stderr=subprocess.DEVNULL).returncode: pytest.skip('other results than the committed ones')
    kept = {pq.read_schema(p).metadata[b'run_id'].decode() for p in (ROOT/'results'/'predictions').glob('*.parquet')}
    tables = {p.stem: pd.read_csv(p, dtype=str) for p in (ROOT/'results'/'tables').glob('*.csv') if p.stem != 'tuning' and not p.stem.endswith('_beside_paper')}
    strange = {n: odd for n, t in tables.items() if 'run_id' in t and (odd := set(t.run_id.dropna()) - kept)}
    assert kept and not strange, strange

def test_published_predictions_are_found_by_their_runs():
    "What determines a run may grow, but a published run keeps its name: else `--from-predictions` finds nothing."
    table = pd.concat([pd.read_csv(ROOT/'results'/'tables'/f'{t}.csv') for t in ('table2', 'table3', 'table4')])
    if set(table.preset) != {'demo'}: pytest.skip('other results than the committed ones')
    from megl.run import make_run, stored_predictions
    runs = table[['dataset', 'backbone', 'method', 'seed']].drop_duplicates().itertuples(index=False)
    lost = [f for r in runs if not (f := stored_predictions(make_run(*r, 'demo', device='cpu'), ROOT/'results')).exists()]
    assert not lost, f'{len(lost)} are not there, {lost[0].name} for one'

def test_every_method_has_a_name():
    from megl.report import METHOD_NAMES
    from megl.run import METHODS
    assert set(METHODS) == set(METHOD_NAMES)

# ---- installation

@pytest.fixture
def project(tmp_path):
    "A folder with the Makefile and a stand-in for Python: it notes its arguments, makes a .venv, and fails where FAIL says."
    for f in ('Makefile', 'settings.ini', 'requirements.lock', 'setup.py', 'pyproject.toml'): shutil.copy(ROOT/f, tmp_path)
    python = tmp_path/'python'
    python.write_text('#!/bin/sh\necho "$@" >> log\ncase "$*" in *"$FAIL"*) exit 1;; esac\n'
                      'if [ "$2" = venv ]; then mkdir -p .venv/bin; cp python .venv/bin/python; fi\n')
    python.chmod(0o755)
    def make(*args, fail='nothing'):
        run = subprocess.run(['make', *args, 'PYTHON=./python'], cwd=tmp_path, env=os.environ | {'FAIL': fail}, capture_output=True, text=True)
        log = tmp_path/'log'
        calls = log.read_text() if log.exists() else ''
        log.unlink(missing_ok=True)
        return run.returncode, calls, run.stderr
    return make

@pytest.mark.skipif(not shutil.which('make'), reason='make is not installed')
def test_make_installs_once_and_again_after_an_interruption(project):
    status, calls, _ = project('test', fail='requirements.lock')
    assert status and 'pytest' not in calls
    status, calls, _ = project('test')
    assert not status and 'venv --clear' in calls and 'install -r requirements.lock' in calls and 'pytest' in calls
    status, calls, _ = project('test')
    assert not status and 'install' not in calls and 'pytest' in calls

@pytest.mark.skipif(not shutil.which('make'), reason='make is not installed')
def test_make_refuses_an_old_python(project):
    status, calls, error = project('test', fail='version_info')
    assert status and 'venv' not in calls and 'Python 3.11 or newer' in error
