"""The page docs/latch.md: each numbered statement names a test, and its code blocks run."""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "latch.md"


def test_every_statement_names_a_test_that_exists():
    prose = re.sub(r"```.*?```", "\n", DOC.read_text(encoding="utf-8"), flags=re.DOTALL)
    statement = re.compile(r"^(\d+)\. (.*?)(?=\n\s*\n|\n\d+\. |\Z)", re.DOTALL | re.MULTILINE)
    statements = statement.findall(prose)
    assert [int(number) for number, _ in statements] == list(range(1, len(statements) + 1))
    assert len(statements) > 30
    latch = "".join(file.read_text() for file in (ROOT / "tests" / "latch").glob("test_*.py"))
    for number, text in statements:
        tests = re.findall(r"`(?:(\w+\.py)::)?(test_\w+)`", text[text.rindex("(") :])
        assert tests, number
        for file, test in tests:
            source = (ROOT / "tests" / file).read_text() if file else latch
            assert f"def {test}(" in source, number


@pytest.mark.slow
def test_code_blocks_run():
    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 6
    for block in blocks:
        exec(compile(block, str(DOC), "exec"), namespace)
    assert set(jax.tree.leaves(namespace["labels"])) == {"latched on", "backbone"}
