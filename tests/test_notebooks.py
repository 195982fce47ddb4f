"Each notebook runs from top to bottom in a real kernel, with its default parameters (the smoke preset)."
import os, re, signal, subprocess, sys
from pathlib import Path

import nbformat, pytest, torch

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('[!_.]*.ipynb'), reverse=True) # the experiments, which take longest, first
SINCE = {'08_model': 'ONNX export', '10_train': 'sharding', '51_paper_scale': 'counts on the meta device'} # what torch 2.6 cannot yet: everything else runs there too
MINUTES = 15 # far above what a notebook needs; it only ends one that hangs
ENV = os.environ | dict(
    PATH=str(Path(sys.executable).parent) + os.pathsep + os.environ['PATH'], # for `!megl …`
    OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', # two threads each would slow two notebooks down tenfold
    HF_HUB_OFFLINE='1', # nothing is fetched
    IN_TEST='1') # nbdev's switch: the last cell of a library notebook, nbdev_export(), then leaves megl/ as it is

def failure(nb, log):
    "The cell that failed, or was running at the end, with its error; the log where there is none."
    for i, cell in enumerate(nb.cells if nb else []):
        errors = [o for o in cell.get('outputs', []) if o.output_type == 'error']
        if errors or cell.metadata.get('papermill', {}).get('status') == 'running':
            trace = '\n'.join(errors[0].traceback).splitlines()[-25:] if errors else log.splitlines()[-25:]
            return re.sub(r'\x1b\[[0-9;]*m', '', '\n'.join([f'cell {i}:', cell.source, '-' * 20, *trace])) # no colours
    return log[-3000:]

@pytest.fixture(scope='session')
def out_dir(tmp_path_factory):
    "One results folder for all experiments, so that they share runs as they do for a user; also between workers."
    base = tmp_path_factory.getbasetemp()
    return (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base)/'results'

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, out_dir):
    if path.stem in SINCE and torch.__version__ < '2.7': pytest.skip(f'{SINCE[path.stem]}: needs torch 2.7')
    nb = nbformat.read(path, as_version=4)
    before, out = set((ROOT/'nbs').rglob('*')), tmp_path/path.name
    command = [sys.executable, '-m', 'papermill', str(path), str(out), '--no-progress-bar']
    cwd = path.parent # as in JupyterLab; experiments run from the root, as on papermill's command line
    if any('parameters' in c.metadata.get('tags', []) for c in nb.cells): command, cwd = [*command, '-p', 'out_dir', str(out_dir)], ROOT
    with open(tmp_path/'log', 'w+') as log:
        process = subprocess.Popen(command, cwd=cwd, env=ENV, stdout=log, stderr=log, start_new_session=True)
        try: status = process.wait(MINUTES * 60)
        except subprocess.TimeoutExpired: status = f'not finished after {MINUTES} minutes'
        finally: # the kernel and its workers are of the same session
            try: os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError: pass
        log.seek(0); text = log.read()
    done = nbformat.read(out, as_version=4) if out.exists() else None
    if status != 0: pytest.fail(f'{path.name}: {status}\n{failure(done, text)}', pytrace=False)
    new = {p.name for p in set((ROOT/'nbs').rglob('*')) - before if not any(part[0] == '.' for part in p.relative_to(ROOT).parts)}
    assert not new, f'{path.name} left files in nbs/: {sorted(new)}'
    changed = subprocess.run(['git', 'diff', '--quiet', 'HEAD', '--', 'results'], cwd=ROOT, stderr=subprocess.DEVNULL).returncode
    if path.stem == 'index' and not changed: # after `make reproduce` at one seed the tables are others
        assert shown_tables(done) == shown_tables(nb), 'run nbs/index.ipynb again, then make readme'

def shown_tables(nb):
    "What the cells display as Markdown: in index.ipynb, the tables read from results/."
    return [o.data['text/markdown'] for c in nb.cells for o in c.get('outputs', []) if 'text/markdown' in o.get('data', {})]

def test_the_notebooks_are_there():
    names = {p.stem for p in NOTEBOOKS}
    assert 'index' in names and '00_core' in names and any(n[0] in '234567' for n in names), names
