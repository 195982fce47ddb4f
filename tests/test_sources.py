"Builders and the data commands as a user meets them: leaks, damage, speed, the command line."
import json, os, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

ROOT = Path(__file__).parent.parent
from megl.check import check
from megl.core import sha256, stable_hash
from megl.data import TOY, DataError, Dataset, load_dataset
from megl.me import build_action_me, build_export, build_object_me
from megl.sources import build_coco, build_folder, build_hub, find_twins, thumbnail

CLASSES = 'cow', 'bus', 'kitchen'
N = 42 # pictures of a source; the last two are near duplicates of the first two, under other names

def picture(i, size=(96, 72)):
    "A picture like no other, of class i mod 3; pictures N-2 and N-1 are 0 and 1, smaller and compressed."
    source = i - (N - 2) if i >= N - 2 else i
    noise = np.random.default_rng(source).integers(0, 255, (6, 8, 3), dtype='uint8')
    return Image.fromarray(noise).resize((size if source == i else (64, 48)), Image.Resampling.BICUBIC)

def label(i): return CLASSES[(i - (N - 2) if i >= N - 2 else i) % 3]

def save(i, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(i).save(path, quality=95 if i < N - 2 else 60)
    return path

def amap(i): return np.stack([np.eye(*picture(i).size[::-1], k) for k in (0, 2, 5)])

# ---- each source, made in its exact form; each returns a function that builds it

def object_me(folder, form):
    entries = {f'{i + 1}001': i for i in range(N)}; name = 'COCO_val2014_{:012}.jpg'.format
    for i in range(N): save(i, folder/'images'/'val2014'/name(i))
    asks = dict(cow='What animal is this?', bus='What type of vehicle is shown?', kitchen='Which room is this?')
    answers = {k: [dict(answer=label(i), answer_id=n, answer_confidence='yes') for n in range(1, 11)] for k, i in entries.items()}
    for d in ('Annotations', 'Questions', 'visual/test'): (folder/d).mkdir(parents=True)
    for k, i in entries.items(): np.save(folder/'visual'/'test'/f'{k}.npy', amap(i))
    if form == 'nlx':
        (folder/'vqaX_test.json').write_text(json.dumps({k: dict(question=asks[label(i)], answers=answers[k], image_id=str(i),
            image_name=name(i), explanation=['this is why', 'and this']) for k, i in entries.items()}))
    else:
        (folder/'Annotations'/'test_exp_anno.json').write_text(json.dumps({k: ['this is why', 'and this'] for k in entries}))
        (folder/'Questions'/'v2_OpenEnded_mscoco_val2014_questions.json').write_text(json.dumps(dict(
            questions=[dict(question_id=int(k), image_id=i, question=asks[label(i)]) for k, i in entries.items()])))
        (folder/'Annotations'/'v2_mscoco_val2014_annotations.json').write_text(json.dumps(dict(
            annotations=[dict(question_id=int(k), image_id=i, answers=answers[k]) for k, i in entries.items()])))
    return lambda out, **kw: build_object_me(folder, folder/'images', out, **kw)

def action_me(folder, form):
    (folder/'textual').mkdir(parents=True); (folder/'visual'/'val').mkdir(parents=True); entries = {}
    for i in range(N):
        save(i, folder/'images'/f'{i:09}.jpg'); np.save(folder/'visual'/'val'/f'{i:09}.npy', amap(i))
        old, new = dict(iid=f'{i:09}', ans=label(i), exp=['why']), dict(image_name=f'{i:09}.jpg', answers=label(i), explanation=['why'])
        entries[f'{i:09}'] = old if form == 'original' else new
    (folder/('textual/exp_val_split.json' if form == 'original' else 'actX_test.json')).write_text(json.dumps(entries))
    return lambda out, **kw: build_action_me(folder, folder/'images', out, **kw)

def export(folder, form):
    (folder/'visual').mkdir(parents=True); entries = {}
    for i in range(N):
        save(i, folder/'images'/f'{i}.jpg'); np.save(folder/'visual'/f'{i}.npy', amap(i))
        entries[str(i)] = dict(class_id=CLASSES.index(label(i)), ans=label(i), image_path=f'images/{i}.jpg', exp=['why'], visual_exp=f'visual/{i}.npy')
    (folder/'exp_annotation.json').write_text(json.dumps(entries))
    (folder/'label_class_id_mapping.json').write_text(json.dumps({c: n for n, c in enumerate(CLASSES)}))
    return lambda out, **kw: build_export(folder, out, **kw)

def coco(folder, form):
    images, things, texts = [], [], []
    for i in range(N):
        save(i, folder/'images'/f'{i}.jpg'); w, h = picture(i).size; images.append(dict(id=i, file_name=f'{i}.jpg', width=w, height=h))
        box = [4, 4, 30, 4, 30, 30, 4, 30]; counts = [h*4, h*20, h*(w - 24)] # a polygon, or run lengths of a crowd
        things.append(dict(id=i, image_id=i, category_id=CLASSES.index(label(i)), iscrowd=i % 2, segmentation=dict(size=[h, w], counts=counts) if i % 2 else [box]))
        texts += [dict(id=2*i + n, image_id=i, caption=f'someone {dict(cow="riding", bus="driving", kitchen="cooking")[label(i)]} {n}') for n in (0, 1)]
    kinds = [dict(id=n, name=c, supercategory=c) for n, c in enumerate(CLASSES)]
    (folder/'instances.json').write_text(json.dumps(dict(images=images, annotations=things, categories=kinds)))
    (folder/'captions.json').write_text(json.dumps(dict(images=images, annotations=texts)))
    return lambda out, **kw: build_coco(folder/'images', folder/'instances.json', folder/'captions.json', out, label=form, **kw)

def own(folder, form):
    lines = ['file_name,label,rationale,map']
    for i in range(N):
        save(i, folder/f'IMG {i}.jpg'); Image.fromarray((255*amap(i)[0]).astype('uint8')).save(folder/f'{i} map.png')
        lines.append(f'IMG {i}.jpg,{label(i)},why,{i} map.png')
    (folder/'table.csv').write_text('\n'.join(lines))
    return lambda out, **kw: build_folder(folder, out, **kw)

def hub(folder, form):
    os.environ |= dict(HF_HUB_OFFLINE='1', HF_DATASETS_CACHE=str(folder/'cache'))
    import datasets
    rows = [dict(image=Image.open(save(i, folder/f'{i}.jpg')), label=label(i), text='why', map=Image.fromarray((255*amap(i)[0]).astype('uint8'))) for i in range(N)]
    features = datasets.Features(image=datasets.Image(), label=datasets.Value('string'), text=datasets.Value('string'), map=datasets.Image())
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder/'train.parquet')
    return lambda out, **kw: build_hub(str(folder/'train.parquet'), out, rationales='text', map='map', **kw)

SOURCES = [(object_me, 'nlx'), (object_me, 'original'), (action_me, 'nlx'), (action_me, 'original'), (export, ''),
           (coco, 'category'), (coco, 'supercategory'), (coco, 'action'), (own, ''), (hub, '')]

@pytest.fixture(params=SOURCES, ids=lambda p: '-'.join(filter(None, [p[0].__name__, p[1]])))
def build(request, tmp_path):
    make, form = request.param
    (tmp_path/'source').mkdir()
    return make(tmp_path/'source', form)

def test_no_test_picture_is_trained_on(build, tmp_path):
    report = build(tmp_path/'out')
    assert len(report.twins) == 2 and report.kept == N and len(report.classes) == 3
    found = check(tmp_path/'out') # compares all pictures, near duplicates too
    assert found.ok, str(found)
    records = load_dataset(tmp_path/'out').records
    assert [r['map_file'] is not None for r in records] == [True]*N
    assert sum(n['samples'] for n in report.splits.values()) == N and len(report.splits) == 3
    ids = [r['id'] for r in records]
    assert ids == sorted(ids, key=stable_hash) # in an order that mixes the classes, however the source is sorted
    again = build(tmp_path/'again')
    assert load_dataset(again.root).fingerprint == load_dataset(report.root).fingerprint # the same bytes each time
    few = load_dataset(build(tmp_path/'few', annotated=.1).root).records
    assert 0 < sum(r['map_file'] is not None for r in few if r['split'] == 'train') < 5
    assert all(r['map_file'] for r in few if r['split'] != 'train')

def test_the_mean_map_is_of_training_alone(build, tmp_path):
    ds = load_dataset(build(tmp_path/'out').root); before = ds.mean_map(6)
    for r in ds.records:
        if r['split'] != 'train': (ds.root/r['map_file']).unlink() # it must not even read them
    assert torch.equal(Dataset(ds.root, ds.info, ds.records).mean_map(6), before)

def test_a_missing_picture_is_named_or_counted(build, tmp_path):
    lost = sorted((tmp_path/'source').rglob('*7.jpg'))[0]
    if any((tmp_path/'source').glob('*.parquet')): pytest.skip('a parquet file holds its pictures')
    lost.unlink()
    with pytest.raises(DataError, match=lost.name.replace('.', r'\.')): build(tmp_path/'out')
    assert not (tmp_path/'out').exists() and not list(tmp_path.glob('.out*'))
    report = build(tmp_path/'out', skip_broken=True)
    assert report.kept == N - 1 and any(lost.name in n for names in report.skipped.values() for n in names)

def test_a_broken_picture_stops_before_anything_is_written(build, tmp_path):
    if any((tmp_path/'source').glob('*.parquet')): pytest.skip('a parquet file holds its pictures')
    broken = sorted((tmp_path/'source').rglob('*5.jpg'))[0]; broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(DataError, match='cannot be decoded'): build(tmp_path/'out')
    assert not (tmp_path/'out').exists()
    assert build(tmp_path/'out', skip_broken=True).kept == N - 1

# ---- the commands

COMMAND = '''
import argparse, sys
from megl.get import add_data_commands
top = argparse.ArgumentParser('megl data'); add_data_commands(top.add_subparsers(required=True))
args = top.parse_args(sys.argv[1:]); sys.exit(args.do(args))
'''

def data(*args, **kw):
    env = os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
    return subprocess.run([sys.executable, '-c', COMMAND, *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True, **kw)

def test_build_and_check_from_the_command_line(tmp_path):
    (tmp_path/'source').mkdir(); own(tmp_path/'source', '')
    run = data('build', 'folder', '--folder', tmp_path/'source', '--out', tmp_path/'out', '--licence', 'CC0')
    assert run.returncode == 0 and f'kept {N} of {N}, 3 classes' in run.stdout and 'near duplicates' in run.stdout, run.stderr
    sound = data('check', tmp_path/'out', '--json')
    assert sound.returncode == 0 and json.loads(sound.stdout)['ok']
    (tmp_path/'out'/'images'/'000003.jpg').write_bytes(b'no picture')
    broken = data('check', tmp_path/'out')
    assert broken.returncode == 1 and 'broken picture (1)' in broken.stdout and '000003.jpg' in broken.stdout
    assert json.loads(data('check', tmp_path/'out', '--json').stdout)['errors'].keys() == {'broken picture'}

def test_get_asks_first(tmp_path):
    run = data('get', 'object-me', '--out', tmp_path/'x', input='n\n')
    assert run.returncode == 1 and '13.5 GB' in run.stdout and 'terms' in run.stdout and 'drive.google.com' in run.stdout
    assert not (tmp_path/'x').exists()

def test_without_anybody_to_answer_nothing_is_downloaded(tmp_path):
    run = data('get', 'object-me', '--out', tmp_path/'x', stdin=subprocess.DEVNULL)
    assert run.returncode == 1 and '--yes' in run.stdout and 'Traceback' not in run.stderr and not (tmp_path/'x').exists()

def test_the_classes_are_chosen_on_the_command_line(tmp_path):
    (tmp_path/'source').mkdir(); action_me(tmp_path/'source', 'nlx'); (tmp_path/'classes.txt').write_text('cow\n\nbus\n')
    build = 'build', 'action-me', '--folder', tmp_path/'source', '--images', tmp_path/'source'/'images', '--out'
    top = data(*build, tmp_path/'one', '--top', 1)
    assert top.returncode == 0 and '1 classes' in top.stdout and 'not there: actX_train.json' in top.stdout and 'actX_val' not in top.stdout, top.stderr
    named = data(*build, tmp_path/'two', '--classes', tmp_path/'classes.txt')
    assert named.returncode == 0 and load_dataset(tmp_path/'two').classes == ['bus', 'cow'], named.stderr
    skipped = json.loads((tmp_path/'two'/'report.json').read_text())['skipped'] # every name
    assert len(skipped['class that is not selected']) == sum(label(i) == 'kitchen' for i in range(N))

@pytest.mark.parametrize('world', TOY)
def test_no_test_picture_of_a_toy_world_has_a_near_duplicate_in_training(world):
    ds = load_dataset(world); splits = [r['split'] for r in ds.records]
    test = [i for i, s in enumerate(splits) if s == 'test']; rest = [i for i, s in enumerate(splits) if s != 'test']
    thumbs = [thumbnail(Image.open(ds.root/r['file_name']).convert('RGB')) for r in ds.records]
    pairs = find_twins([thumbs[i] for i in test + rest]); n = len(test)
    assert n and not [(ds.records[test[i]]['id'], ds.records[rest[j - n]]['id']) for i, j in pairs if i < n <= j]

def test_many_samples_are_checked_by_several_processes(tmp_path):
    "How fast, for 20,000, is measured in 50_benchmark."
    (tmp_path/'d'/'images').mkdir(parents=True); lines, rng = [], np.random.default_rng(0)
    for i in range(1200):
        Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype='uint8')).resize((80, 60), Image.Resampling.BICUBIC).save(tmp_path/'d'/'images'/f'{i}.jpg')
        lines.append(json.dumps(dict(id=str(i), file_name=f'images/{i}.jpg', label='ab'[i % 2], rationales=['why'], split=('train', 'train', 'val', 'test')[i % 4], group=str(i), map_file=None)) + '\n')
    (tmp_path/'d'/'images'/'1100.jpg').write_bytes(b'no picture')
    (tmp_path/'d'/'metadata.jsonl').write_text(''.join(lines))
    info = dict(name='d', classes=['a', 'b'], metadata_sha256=sha256(tmp_path/'d'/'metadata.jsonl'))
    (tmp_path/'d'/'dataset.json').write_text(json.dumps(info))
    one, two = (check(tmp_path/'d', jobs=n).as_dict() for n in (1, 2))
    assert one == two and one['samples'] == 1200 and list(one['errors']) == ['broken picture'] and len(one['errors']['broken picture']) == 1
