"One run on several processes, several runs on several workers: the same numbers, also when one of them is killed."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pandas as pd, psutil, pytest, torch

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
ENV = os.environ | dict(PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}", OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1')
ENV = {k: v for k, v in ENV.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_PORT')}

sharding = pytest.mark.skipif(torch.__version__ < '2.7', reason='sharding needs torch 2.7') # a TorchVersion, which compares as versions do

def start(*args): return subprocess.Popen([BIN/args[0], *map(str, args[1:])], env=ENV, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

def call(*args): # what a command of this environment prints
    run = start(*args)
    try: out, err = run.communicate(timeout=600)
    finally:
        if run.poll() is None: os.killpg(run.pid, signal.SIGKILL) # with all that it has started
    assert run.returncode == 0, out[-3000:] + err[-3000:]
    return out

def differ(a, b): # largest difference of two tensors, or lists of them, relative to the first
    a, b = (torch.cat([torch.as_tensor(t, dtype=torch.float64).flatten() for t in x]) for x in (a, b))
    return float((a - b).norm()/a.norm())

# One batch, shared by two processes

SHARED = '''
import sys, torch
import megl.train
from megl.classifiers import ViT
from megl.core import set_seed
from megl.data import load_dataset
from megl.mllm import MLLM
from megl.model import MEGL
from megl.rationale import RationaleGenerator, lora_config
from megl.run import _leave
from torch.optim.optimizer import register_optimizer_step_pre_hook

torch.set_num_threads(1); folder, batch_size = sys.argv[1], int(sys.argv[2])
train, val = (load_dataset('toy-object', s) for s in ('train', 'val'))
has_map = lambda n, has: [i for i, r in enumerate(train.records) if (r['map_file'] is not None) == has][:n]
train, val = train.subset(has_map(5, True) + has_map(16, False)), val.subset(range(24)) # 21 samples in batches of 16: 5 in the last

gradients, shares, means, written = [], [], [], []
def before_step(optimizer, *_):
    for g in optimizer.param_groups: g['eps'] = 1e-3 # at Adam's 1e-8, a gradient that is 0 but for rounding is a whole step
    gradients.append([p.grad.clone() for g in optimizer.param_groups for p in g['params']])
register_optimizer_step_pre_hook(before_step)

def watch(name, kept, of=lambda args, result: result): # what a function of the module gives, or gets
    f = getattr(megl.train, name)
    def watched(*args, **kw): result = f(*args, **kw); kept.append(of(args, result)); return result
    setattr(megl.train, name, watched)
watch('term_shares', shares, lambda args, result: sum(int(b['annotated'].sum()) for b in args[2]))
watch('_consistency_target', means); watch('save_checkpoint', written, lambda args, result: str(args[0]))

def run(mllm=False, **options):
    set_seed(0); texts = [t for r in train.records for t in r['rationales']]
    classifier = ViT(48, 8, 2, 4, 64, 128, num_classes=len(train.classes)) # as ViT-B/16, without BatchNorm
    generator = RationaleGenerator.from_config(texts, 1 if mllm else classifier.head.in_features, lora=lora_config(r=4, lora_dropout=0.))
    model = MLLM(generator, train.classes) if mllm else MEGL(classifier, generator, train.classes)
    for kept in (gradients, shares, means, written): kept.clear()
    options = dict(batch_size=batch_size) | options; name = '-'.join(f'{k}-{v}' for k, v in options.items())
    config = megl.train.TrainConfig(epochs=2, lr=1e-3, lr_generator=1e-3, grad_clip=1e6, lambda_t=1., lambda_v=0. if mllm else 1., **options)
    history = megl.train.fit(model, train, val, config, f'{folder}/{name}-{mllm}', device='cpu', quiet=True)
    return dict(history=history.drop(columns='seconds').to_dict('list'), gradients=[*gradients], shares=[*shares], mean=means[0], written=[*written],
                weights=list(megl.train.trained_state(model).values()))

found = [run(), run(accumulate=2), run(batch_size=2*batch_size), run(mllm=True)]
torch.save(found, f"{folder}/{torch.distributed.get_rank() if torch.distributed.is_initialized() else 0}.pt"); _leave()
'''

def test_two_processes_learn_as_one_with_twice_the_batch(tmp_path):
    script = tmp_path/'shared.py'; script.write_text(SHARED); (tmp_path/'one').mkdir(); (tmp_path/'two').mkdir()
    call('python', script, tmp_path/'one', 16)
    call('torchrun', '--standalone', '--nproc_per_node', 2, script, tmp_path/'two', 8)
    one, first, second = (torch.load(tmp_path/f, weights_only=True) for f in ('one/0.pt', 'two/0.pt', 'two/1.pt'))
    spread = [*zip(first[0]['shares'], second[0]['shares'])]
    assert any(a != b for a, b in spread) and any(0 in s and sum(s) for s in spread), f'annotated samples are spread evenly: {spread}'
    def agree(o, a):
        for k, curve in o['history'].items(): assert differ(curve, a['history'][k]) <= 1e-5 or curve == a['history'][k], k
        assert max(differ([x], [y]) for x, y in zip(o['gradients'][0], a['gradients'][0])) <= 1e-5 # of each parameter
        assert differ(o['weights'], a['weights']) <= 1e-5 and len(o['gradients']) == len(a['gradients'])
    for o, a, b in zip(one, first, second): # a step a batch; a step of the full and the last, uneven batch; of both in one; a language model alone
        assert a['history'] == b['history'] and o['history'].keys() == a['history'].keys()
        assert {'text', 'loss', 'val_accuracy', *(() if o is one[3] else ('pred', 'visual', 'dc', 'val_miou'))} < a['history'].keys()
        agree(o, a)
        assert all(map(torch.equal, sum(a['gradients'], a['weights']), sum(b['gradients'], b['weights']))) # in both processes
        assert o['mean'] is a['mean'] is b['mean'] is None if o is one[3] else torch.equal(o['mean'], a['mean']) and torch.equal(o['mean'], b['mean'])
        assert len(a['written']) == 2 and not b['written'] # the first process alone writes
    agree(one[1], one[2]); agree(first[1], first[2]) # accumulated batches are one large batch

# The frozen layers, spread over two processes

SHARDED = '''
import os, sys, torch
from functools import partial
import megl.train
from megl.classifiers import create_classifier
from megl.core import set_seed
from megl.data import load_dataset
from megl.mllm import MLLM
from megl.model import MEGL
from megl.rationale import RationaleGenerator, lora_config
from megl.run import _leave
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from torch._dynamo.testing import CompileCounterWithBackend
programs = CompileCounterWithBackend('aot_eager'); torch.compile = partial(torch.compile, backend=programs) # all but the generation of code
torch.set_num_threads(1); rank = int(os.environ['RANK']); folder = f"{sys.argv[1]}/{rank}"; asked = os.environ.pop('ACCELERATE_USE_FSDP', None)
train, val = (load_dataset('toy-object', s) for s in ('train', 'val')); train, val = train.subset(range(21)), val.subset(range(10))
texts = [t for r in train.records for t in r['rationales']]
set_seed(0); base = RationaleGenerator.from_config(texts, 1, lora=False); base.model.save_pretrained(folder); base.tokenizer.save_pretrained(folder)
gradients = []
register_optimizer_step_pre_hook(lambda optimizer, *_: gradients.append([p.grad.clone() for g in optimizer.param_groups for p in g['params']]))

def fit(name, mllm=False, sharded=True, **options):
    os.environ.pop('MEGL_SHARD', None); gradients.clear(); set_seed(0)
    if sharded: os.environ['ACCELERATE_USE_FSDP'] = asked # what the launcher said
    classifier = None if mllm else create_classifier('vit_tiny', len(train.classes))
    generator = RationaleGenerator.from_pretrained(folder, 1 if mllm else classifier.head.in_features, lora=lora_config(r=4, lora_dropout=0.), checkpointing=True)
    model = MLLM(generator, train.classes, mode='answer') if mllm else MEGL(classifier, generator, train.classes)
    config = megl.train.TrainConfig(batch_size=4, lr=1e-3, lr_generator=1e-2, lambda_t=1., lambda_v=0. if mllm else 1., eval_batch=4, compile=sharded and not mllm, **options)
    history = megl.train.fit(model, train, val, config, f'{sys.argv[1]}/{name}', device='cpu', quiet=True)
    said = megl.train.predict_dataset(model, val.subset(range(4)), rationales=True) # both processes
    spread = {n: [p.numel(), p.to_local().numel()] for n, p in model.named_parameters() if isinstance(p, DTensor)}
    frozen = [n for n, p in model.named_parameters() if '.language_model.layers.' in n and not p.requires_grad]
    return model, dict(history=history.drop(columns='seconds').to_dict('list'), gradients=[*gradients], weights=list(megl.train.trained_state(model).values()),
                       said=said[['probabilities', 'map', 'rationale', 'answer']].to_dict('list'), spread=spread, frozen=frozen)

found = dict(asked=asked)
for kind, more in dict(megl=dict(epochs=2), mllm=dict(mllm=True, epochs=1)).items():
    found[kind] = [fit(f'{kind}-whole', sharded=False, **more)[1]]
    model, sharded = fit(f'{kind}-sharded', **more); found[kind].append(sharded); found[f'{kind} programs'] = programs.frame_count
    if rank == 0 and kind == 'megl': # alone
        model.save_pretrained(f'{folder}/model'); images = torch.stack([s.image for s in val.with_transform(megl.train.eval_transform(48))])
        found['loaded'] = bool(torch.equal(model.infer(images).probabilities, MEGL.from_pretrained(f'{folder}/model').infer(images).probabilities))

epoch = megl.train._epoch
def dies(*args):
    if args[6] == 1: raise KeyboardInterrupt
    return epoch(*args)
megl.train._epoch = dies
try: fit('resumed', epochs=2)
except KeyboardInterrupt: found['killed'] = True
megl.train._epoch = epoch; found['megl'].append(fit('resumed', epochs=2)[1])
torch.save(found, f"{sys.argv[1]}/{rank}.pt"); _leave()
'''

@sharding
def test_sharded_layers_learn_as_whole_ones(tmp_path):
    "Those of MEGL compiled besides."
    script = tmp_path/'sharded.py'; script.write_text(SHARDED)
    call('accelerate-launch', '--config_file', 'nbs/params/accelerate_fsdp.yaml', '--num_processes', 2, script, tmp_path)
    both = [torch.load(tmp_path/f'{rank}.pt', weights_only=True) for rank in (0, 1)]
    for found in both:
        assert found['asked'] == 'true' and found['killed'] # by the configuration file
        for kind in ('megl', 'mllm'):
            whole, sharded = found[kind][:2]
            assert not whole['spread'] and sharded['frozen'] and sorted(sharded['spread']) == sorted(sharded['frozen'])
            total, own = map(sum, zip(*sharded['spread'].values())); assert .45 < own/total < .55
            assert whole['history'].keys() == sharded['history'].keys() > {'text', 'loss', 'val_accuracy'}
            for k, curve in whole['history'].items(): assert differ([curve], [sharded['history'][k]]) <= 1e-5 or curve == sharded['history'][k], k
            assert len(whole['gradients']) == len(sharded['gradients']) == 3*len(curve)
            for a, b in zip(whole['gradients'], sharded['gradients']): assert differ(a, b) <= 1e-5
            assert differ(whole['weights'], sharded['weights']) <= 1e-5
            assert whole['said']['rationale'] == sharded['said']['rationale'] and whole['said']['answer'] == sharded['said']['answer']
            assert differ(whole['said']['probabilities'], sharded['said']['probabilities']) <= 1e-5
        assert found['megl programs'] == found['mllm programs'] > 0 # of MEGL's layers alone
        _, sharded, resumed = found['megl']
        assert sharded['history'] == resumed['history'] and all(map(torch.equal, sharded['weights'], resumed['weights']))
    assert both[0]['loaded'] and all(map(torch.equal, both[0]['megl'][1]['weights'], both[1]['megl'][1]['weights']))
    parts = [{n: s[1] for n, s in b['megl'][1]['spread'].items()} for b in both]
    assert all(parts[0][n] + parts[1][n] == size for n, (size, _) in both[0]['megl'][1]['spread'].items()) # nothing is held twice

# One run, started by a launcher; one of its processes killed

WHOLE = '--multi_gpu', '--num_processes', 2, '--num_machines', 1, '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', 0
SPREAD = '--config_file', 'nbs/params/accelerate_fsdp.yaml', '--num_processes', 2

def launch(out, how=WHOLE, method='megl', epochs=5):
    return ('accelerate-launch', *how, '-m', 'megl.train', 'toy-object', '--method', method, *(('--backbone', 'vit_tiny') if method == 'megl' else ()), '--epochs', epochs, '--device', 'cpu', '--out-dir', out)

def results(out):
    folder, = (p.parent for p in out.glob('runs/*/run.json'))
    return folder, pd.read_parquet(folder/'predictions.parquet'), {p.name: p.read_bytes() for p in folder.glob('model/**/*.safetensors')}

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp('whole')
    return out, call(*launch(out))

def test_accelerate_launch_gives_a_finished_run(whole):
    out, said = whole; folder, predictions, weights = results(out)
    assert said.split('\n')[0].startswith('toy-object vit_tiny megl seed 0: trained in') and said.split('\n')[1:] == [str(folder/'model'), ''] # said once
    assert {p.name for p in folder.iterdir()} == {'run.json', 'history.csv', 'predictions.parquet', 'model', 'lock'}
    assert len(weights) > 1 and predictions.rationale.notna().all() and len(pd.read_csv(folder/'history.csv')) == 5
    assert json.loads((folder/'run.json').read_text())['run']['train']['lambda_t'] == 1
    assert 'reused' in call(*launch(out)) # and nothing hangs

@sharding
def test_a_sharded_launch_predicts_as_a_plain_one(whole, tmp_path):
    call(*launch(tmp_path, SPREAD)); (_, plain, _), (_, sharded, _) = results(whole[0]), results(tmp_path)
    assert plain[['id', 'predicted', 'rationale']].equals(sharded[['id', 'predicted', 'rationale']])
    assert differ(plain.probabilities.map(list).tolist(), sharded.probabilities.map(list).tolist()) < 1e-3 # as stored, in half precision

@sharding
def test_a_sharded_language_model_answers_by_all_processes(tmp_path):
    call(*launch(tmp_path, SPREAD, method='finetune-cot', epochs=1)); p = pd.read_parquet(next(tmp_path.glob('runs/*/predictions.parquet'))) # hangs where one process answers alone
    assert len(p) == 16 and p.answer.notna().all() and p.rationale.notna().all()

def test_a_killed_process_ends_the_launch_and_the_next_continues(whole, tmp_path):
    launcher = start(*launch(tmp_path))
    while not (begun := list(tmp_path.glob('runs/*/last.pt'))) and launcher.poll() is None: time.sleep(.01)
    assert begun, launcher.communicate()
    second, = (p for p in psutil.Process(launcher.pid).children(recursive=True) if p.environ().get('RANK') == '1')
    second.send_signal(signal.SIGKILL)
    said = launcher.communicate(timeout=60)[1]
    assert launcher.returncode and 'Signal 9 (SIGKILL)' in said and 'rank      : 1' in said, said[-3000:]
    assert not list(tmp_path.glob('runs/*/run.json')), 'it was finished before it could be killed'
    call(*launch(tmp_path))
    (_, a, whole_weights), (_, b, weights) = results(whole[0]), results(tmp_path)
    pd.testing.assert_frame_equal(a, b); assert weights == whole_weights

# Many runs, on the workers of a Dask cluster, one of them killed

GRID = '''
import os, signal, sys, threading, time
from pathlib import Path

def main(out):
    import joblib, pandas as pd, psutil
    from dask.distributed import Client, LocalCluster
    from megl.run import execute_all, load_predictions, make_run, run_folder
    runs = [make_run('toy-object', 'resnet_tiny', 'visual', seed, epochs=4, device='cpu') for seed in range(3)]
    folders = [run_folder(r, out/'dask') for r in runs]; finished = lambda f: (f/'run.json').exists()
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        workers = client.run(os.getpid).values()
        def at_work(folder): # the workers that hold a run's lock
            return [p for p in workers if str(folder/'lock') in {f.path for f in psutil.Process(p).open_files()}]
        def kill(): # as soon as one run is finished and another has a checkpoint
            while not (any(map(finished, folders)) and (begun := [p for f in folders if (f/'last.pt').exists() and not finished(f) for p in at_work(f)])): time.sleep(.005)
            os.kill(begun[0], signal.SIGKILL); print('killed with', sum(map(finished, folders)), 'of 3 runs finished', flush=True)
        threading.Thread(target=kill, daemon=True).start()
        with joblib.parallel_config('dask'): execute_all(runs, out/'dask', 'cpu')
    execute_all(runs, out/'loky', 'cpu', jobs=2)
    for r in runs: pd.testing.assert_frame_equal(load_predictions(r, out/'dask'), load_predictions(r, out/'loky'))

if __name__ == '__main__': main(Path(sys.argv[1]))
'''

def test_a_grid_survives_the_death_of_a_dask_worker(tmp_path):
    script = tmp_path/'grid.py'; script.write_text(GRID)
    said = call('python', script, tmp_path).split('\n')
    assert sum(': trained in' in line for line in said) == 6, said # by Dask's workers, by joblib's; none was finished when its worker died
    assert {'killed with 1 of 3 runs finished', 'killed with 2 of 3 runs finished'} & {*said}, said
