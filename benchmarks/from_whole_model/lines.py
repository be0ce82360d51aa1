"""How many lines of its own each program of this folder has, beside those of the unsplit one. Strings that stand alone,
comments and empty lines do not count.

python benchmarks/from_whole_model/lines.py
"""

import ast
import difflib
from pathlib import Path


def lines_of(path: Path) -> list[str]:
    text = path.read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


here = Path(__file__).parent
unsplit = lines_of(here / "unsplit.py")
for path in sorted(here.glob("*.py")):
    if path.name not in ("lines.py", "unsplit.py", "whole_model.py"):
        difference = difflib.ndiff(unsplit, lines_of(path))
        print(f"{path.name:28} {sum(line.startswith('+ ') for line in difference):3}")
