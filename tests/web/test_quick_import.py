import subprocess
import sys

SCRIPT = """
import ast, sys
ast.get_source_segment = None  # by which gradio finds the source of a component for its stub
from maskgit_pl.web.quick_import import import_gradio
before = list(sys.meta_path)
import_gradio()
import gradio
assert sys.meta_path == before
print(gradio.Dropdown(["a", "b"], value="b").value)
"""


def test_gradio_is_imported_without_its_stubs_and_works() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("b\n", 0), done.stderr
