"Experiments as a user runs them: three ways with equal results, killed and run again, two at a time, and the command."
import json, os, shutil, signal, subprocess, sys, time
from functools import partial
from pathlib import Path

import numpy as np, pandas as pd, pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
ENV = os.environ | dict(PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}", OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1')

def call(*args, cwd=ROOT, check=True):
    "Run a command of this environment; its output is shown if it fails."
    run = subprocess.run([BIN/args[0], *map(str, args[1:])], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=1200)
    assert not check or run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run

def test_three_ways_give_the_same_table(tmp_path):
    call('megl', 'run', 'table1', '--out-dir', tmp_path/'command')
    call('papermill', 'nbs/20_table1.ipynb', tmp_path/'out.ipynb', '-p', 'out_dir', tmp_path/'papermill')
    call('jupyter', 'nbconvert', '--to', 'notebook', '--execute', '--output-dir', tmp_path, '20_table1.ipynb', cwd=ROOT/'nbs') # Run all
    tables = [(p/'tables'/'table1.csv').read_bytes() for p in (tmp_path/'command', tmp_path/'papermill', ROOT/'results'/'runs'/'smoke')]
    assert tables[0] == tables[1] == tables[2] and tables[0].startswith(b'item,dataset')

def test_trained_numbers_do_not_depend_on_the_way(tmp_path):
    chosen = ['-p', 'dataset', 'toy-object', '-p', 'methods', 'plain', '-p', 'device', 'cpu']
    call('megl', 'run', 'table2', *chosen, '--out-dir', tmp_path/'command')
    call('papermill', '21_table2.ipynb', tmp_path/'out.ipynb', *chosen, '-p', 'out_dir', tmp_path/'papermill', cwd=ROOT/'nbs')
    a, b = ((tmp_path/way/'tables'/'table2.csv').read_bytes() for way in ('command', 'papermill'))
    assert a == b

def test_papermill_with_an_unknown_parameter_stops(tmp_path):
    run = call('papermill', 'nbs/21_table2.ipynb', tmp_path/'out.ipynb', '-p', 'sedes', '3', '-p', 'out_dir', tmp_path, check=False)
    assert run.returncode and "unknown parameter 'sedes': choose one of preset, dataset, methods, seeds" in run.stderr
    run = call('megl', 'run', 'table2', '-p', 'sedes', '3', check=False)
    assert run.returncode == 2 and run.stderr.startswith("megl: unknown parameter") and 'seeds' in run.stderr

def test_reproduce_writes_everything_and_then_reuses_it(tmp_path):
    wanted = [f'tables/table{n}.{kind}' for n in (1, 2, 3, 4, 5) for kind in ('csv', 'md', 'tex')] + [f'figures/figure{n}.{kind}' for n in (1, 2) for kind in ('png', 'pdf')]
    args = 'megl', 'reproduce', '--preset', 'smoke', '--device', 'cpu', '--out-dir', tmp_path
    first = call(*args).stdout
    assert not [f for f in wanted if not (tmp_path/f).exists() or str(tmp_path/f) not in first] and '| Backbone |' in first
    fixed = [f for f in wanted if 'table5' not in f] # a table of times
    tables = [(tmp_path/f).read_bytes() for f in fixed]
    again = call(*args).stdout
    assert 'trained in' not in again and tables == [(tmp_path/f).read_bytes() for f in fixed]
    shutil.rmtree(tmp_path/'runs') # the predictions of the published rows are enough
    stored = call(*args, '--from-predictions').stdout
    assert 'trained in' not in stored and tables == [(tmp_path/f).read_bytes() for f in fixed]

@pytest.mark.parametrize('name, options, table', [
    ('faithfulness', dict(images=8, steps=4, points=3), 'randomisation'), ('tuning', dict(methods='plain,visual'), 'tuning_choice')])
def test_answers_of_models_are_kept_too(tmp_path, name, options, table):
    args = 'megl', 'run', name, '--out-dir', tmp_path, *(a for k, v in dict(options, dataset='toy-object', device='cpu').items() for a in ('-p', k, v))
    call(*args); files = sorted((tmp_path/'tables').iterdir()); before = [f.read_bytes() for f in files]
    assert tmp_path/'tables'/f'{table}.csv' in files
    shutil.rmtree(tmp_path/'runs'); call(*args, '--from-predictions')
    assert before == [f.read_bytes() for f in files]

RUN = '''
import sys
from megl.run import execute, make_run
print(execute(make_run('toy-object', 'resnet_tiny', 'visual', seed=3, epochs=4), sys.argv[1], 'cpu'))
'''

def start(out): return subprocess.Popen([sys.executable, '-c', RUN, str(out)], env=ENV, cwd=ROOT, stdout=subprocess.PIPE, text=True)

def predictions(out): return pd.read_parquet(next(out.glob('runs/*/predictions.parquet')))

def test_a_killed_run_continues_to_the_same_numbers(tmp_path):
    assert start(tmp_path/'whole').wait(300) == 0
    victim = start(tmp_path/'killed')
    while not list((tmp_path/'killed').glob('runs/*/last.pt')) and victim.poll() is None: time.sleep(.01)
    victim.send_signal(signal.SIGKILL); victim.wait()
    assert not list((tmp_path/'killed').glob('runs/*/run.json')), 'it was finished before it could be killed'
    assert start(tmp_path/'killed').wait(300) == 0
    pd.testing.assert_frame_equal(predictions(tmp_path/'whole'), predictions(tmp_path/'killed'))

def test_two_processes_on_one_results_folder(tmp_path):
    said = sorted(p.communicate(timeout=300)[0].strip().split(': ')[1].split()[0] for p in [start(tmp_path), start(tmp_path)])
    assert said == ['reused', 'trained']

@pytest.fixture
def coco(tmp_path):
    "A COCO-format folder of two classes: a bright square on the left or on the right."
    from PIL import Image, ImageDraw
    (tmp_path/'images').mkdir(); images, annotations, captions = [], [], []
    for i in range(24):
        x = 5 + 40*(i % 2); noise = np.random.default_rng(i).integers(0, 120, (6, 8, 3), 'uint8') # else all would be near duplicates
        picture = Image.fromarray(noise).resize((80, 60)); ImageDraw.Draw(picture).rectangle((x, 10, x+25, 40), fill=(240, 200, i))
        picture.save(tmp_path/'images'/f'{i}.png'); images.append(dict(id=i, file_name=f'{i}.png', height=60, width=80))
        annotations.append(dict(id=i, image_id=i, category_id=i % 2, iscrowd=0, area=750, bbox=[x, 10, 25, 30], segmentation=[[x, 10, x+25, 10, x+25, 40, x, 40]]))
        captions.append(dict(id=i, image_id=i, caption=f"a square on the {('left', 'right')[i % 2]}"))
    kinds = [dict(id=k, name=n, supercategory=n) for k, n in enumerate(('left', 'right'))]
    (tmp_path/'instances.json').write_text(json.dumps(dict(images=images, annotations=annotations, categories=kinds)))
    (tmp_path/'captions.json').write_text(json.dumps(dict(images=images, annotations=captions)))
    return tmp_path

def test_from_a_coco_folder_to_an_explained_image(coco):
    built = call('megl', 'data', 'build', 'coco', '--images', coco/'images', '--instances', coco/'instances.json', '--captions', coco/'captions.json', '--out', coco/'data')
    assert '24' in built.stdout
    assert '24 samples, sound' in call('megl', 'data', 'check', coco/'data').stdout
    (coco/'data'/'images'/'3.png').write_bytes(b'no picture')
    broken = call('megl', 'data', 'check', coco/'data', check=False)
    assert broken.returncode == 1 and '3.png' in broken.stdout + broken.stderr
    (coco/'data'/'images'/'3.png').write_bytes((coco/'images'/'3.png').read_bytes())
    call('megl', 'run', 'figure1', '-p', 'dataset', coco/'data', '-p', 'device', 'cpu', '--out-dir', coco/'out')
    assert (coco/'out'/'figures'/'figure1.png').stat().st_size > 10_000
    model = next(p.parent for p in coco.glob('out/runs/*/model/generator'))
    said = call('megl', 'explain', coco/'images'/'0.png', '--model', model, '--device', 'cpu', '--out', coco/'why.png')
    assert said.stdout.split(' ')[0] in ('left', 'right') and (coco/'why.png').exists()

@pytest.mark.parametrize('backbone', ['resnet18', 'vit_b_16'])
def test_the_paper_preset_on_a_reduced_checkpoint(tmp_path, backbone, monkeypatch):
    "Real classifiers, a LLaVA of the same classes and files but little width; all else as the preset says, but that no code is generated."
    import torch
    from torch._dynamo.testing import CompileCounterWithBackend
    programs = CompileCounterWithBackend('aot_eager'); monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=programs))
    from megl.classifiers import create_classifier
    from megl.data import eval_transform, load_dataset
    from megl.model import MEGL
    from megl.rationale import small_llava_config, train_tokenizer
    from megl.run import PRESETS, execute, make_run, read_predictions, run_folder
    from megl.toy import ToyConfig, build
    from transformers import CLIPImageProcessor, LlavaForConditionalGeneration, LlavaProcessor
    build('toy-object', tmp_path/'world', ToyConfig(train=18, val=8, test=8, pretrain=1, annotated=.3))
    texts = [t for r in load_dataset(tmp_path/'world', 'train').records for t in r['rationales']]; tokenizer = train_tokenizer(texts)
    LlavaForConditionalGeneration(small_llava_config(tokenizer)).to(torch.bfloat16).save_pretrained(tmp_path/'llava', max_shard_size='200KB')
    LlavaProcessor(CLIPImageProcessor(size=dict(shortest_edge=48), crop_size=dict(height=48, width=48)), tokenizer, patch_size=8).save_pretrained(tmp_path/'llava')
    torch.save(create_classifier(backbone, 1000).state_dict(), tmp_path/'classifier.pt')
    run = make_run(tmp_path/'world', backbone, 'megl', 0, 'paper', 1, 'cpu', base=str(tmp_path/'llava'), weights=str(tmp_path/'classifier.pt'), workers=0, compile=True)
    assert run.train.accumulate == 4 and run.train.precision == 'bf16' and run.train.compile and dict(run.generator) == dict(PRESETS['paper'].generator) and dict(run.lora)['r'] == 32
    assert 'trained' in execute(run, tmp_path, 'cpu') and programs.frame_count > 1 # of the layers, besides a first try
    p, folder = read_predictions(run_folder(run, tmp_path)/'predictions.parquet'), run_folder(run, tmp_path)/'model'
    assert len(p) == 8 and p.rationale.notna().all() and p.height[0] == dict(resnet18=7, vit_b_16=14)[backbone]
    assert '| accuracy |' in (folder/'README.md').read_text() and json.loads((folder/'run.json').read_text())['id'] == run.id
    again = MEGL.from_pretrained(folder)
    assert {q.dtype for q in again.generator.parameters() if not q.requires_grad} == {torch.bfloat16} and {q.dtype for q in again.classifier.parameters()} == {torch.float32}
    images = torch.stack([x.image for x in load_dataset(tmp_path/'world', 'test', eval_transform(again.image_size))])
    told = again.infer(images, rationales=True); assert told.rationales == p.rationale.tolist() # as the trained model said them
    assert told.probabilities.argmax(1).tolist() == p.predicted.tolist() and not list(tmp_path.glob('runs/base-*')) # nothing small was pre-trained in its place

def test_the_photos_preset_on_reduced_parts(tmp_path):
    "A CLIP and a causal language model by their folders, of little width; all else as the preset says."
    import torch
    from megl.classifiers import create_classifier
    from megl.data import load_dataset
    from megl.rationale import small_llava_config, train_tokenizer
    from megl.run import METHODS, execute, load_predictions, make_run, run_folder
    from megl.model import MEGL
    from megl.toy import ToyConfig, build
    from transformers import AutoModel, AutoModelForCausalLM, CLIPImageProcessor
    build('toy-object', tmp_path/'world', ToyConfig(train=8, val=8, test=8, pretrain=1, annotated=.5))
    tokenizer = train_tokenizer([t for r in load_dataset(tmp_path/'world', 'train').records for t in r['rationales']]); config = small_llava_config(tokenizer)
    AutoModel.from_config(config.vision_config).save_pretrained(tmp_path/'clip'); AutoModelForCausalLM.from_config(config.text_config).save_pretrained(tmp_path/'lm')
    CLIPImageProcessor(size=dict(shortest_edge=48), crop_size=dict(height=48, width=48)).save_pretrained(tmp_path/'clip'); tokenizer.save_pretrained(tmp_path/'lm')
    torch.save(create_classifier('resnet18', 1000).state_dict(), tmp_path/'classifier.pt')
    for method in ('plain', 'megl'):
        run = make_run(tmp_path/'world', 'resnet18', method, 0, 'photos', 1, 'cpu', base=f"{tmp_path/'clip'},{tmp_path/'lm'}", weights=str(tmp_path/'classifier.pt'))
        assert run.train.batch_size == 4 and run.weights and bool(run.base) == bool(METHODS[method].text) and 'trained' in execute(run, tmp_path, 'cpu')
        p = load_predictions(run, tmp_path); assert len(p) == 8 and p.rationale.notna().all() == bool(METHODS[method].text)
    again = MEGL.from_pretrained(run_folder(run, tmp_path)/'model')
    assert again.image_size == 224 and again.generator.image_size == 48 and dict(run.lora)['r'] == again.generator.llava.peft_config['default'].r == 16
    assert not list(tmp_path.glob('runs/base-*'))
