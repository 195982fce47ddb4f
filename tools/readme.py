"Write README.md from nbs/index.ipynb and the outputs stored in it. Nothing is executed, and Quarto is not needed."
import json, posixpath, re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbdev.process import NBProcessor
from nbdev.processors import filter_stream_, hide_, hide_line, strip_ansi

root = Path(__file__).parent.parent
HEADER = '<!-- Written by `make readme` from nbs/index.ipynb: edit the notebook. -->\n\n'

def quarto_options(cell):
    "What Quarto does with `#| echo: false`, `#| output: false` and `#| include: false`; `hide_input` is echo by its older name."
    if cell.cell_type != 'code': return
    off = {k.rstrip(':') for k, v in cell.directives_.items() if v == ['false']}
    cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
    if off & {'include', 'output'}: cell.outputs = []
    if off & {'include', 'echo'} or 'hide_input' in cell.directives_: cell.metadata['transient'] = {'remove_source': True}

def from_root(text):
    "Links and images in the notebook are relative to nbs/; README.md lies one folder up."
    move = lambda m: m[1] + posixpath.normpath(posixpath.join('nbs', m[2])) + m[3]
    return re.sub(r'(\]\(|\b(?:src|href)=")(?!\w+:|#|/)([^)"\s]+)(\)|")', move, text)

def readme(path=root/'nbs'/'index.ipynb'):
    "The text of README.md for the notebook at `path`."
    proc = NBProcessor(path, procs=[strip_ansi, hide_line, filter_stream_, hide_, quarto_options], process=True)
    nb = nbformat.reads(json.dumps(proc.nb), as_version=4)
    nb.metadata['language_info'] = {'name': 'python'} # nbdev_clean leaves it out; code fences carry it
    for cell in nb.cells:
        if cell.cell_type == 'markdown': cell.source = from_root(cell.source)
        else: cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
        for data in (o.data for o in cell.get('outputs', []) if 'data' in o):
            if any(kind.startswith('image/') for kind in data):
                raise ValueError(f'{path}: show figures by a link to results/figures, not as an output')
            for kind in {'text/markdown', 'text/html'} & set(data):
                data[kind] = re.sub(r'<style.*?</style>\n?', '', from_root(data[kind]), flags=re.S)
    text, _ = MarkdownExporter().from_notebook_node(nb)
    return HEADER + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'

if __name__ == '__main__':
    (root/'README.md').write_text(readme(), encoding='utf-8')
    print('README.md written from nbs/index.ipynb')
