"""What of a function's code is in an identity: all that could change a number, and no words."""

import importlib.util
import linecache
import sys
from pathlib import Path

import pytest

from dass.code import code_of
from dass.pruning.criteria import CRITERIA
from dass.pruning.order import ORDERS
from dass.pruning.update import UPDATES
from dass.records import read_records

ROOT = Path(__file__).parents[1]

HEAD = "import functools\nfrom collections import namedtuple\nfrom typing import NamedTuple\nimport torch\n\n"
USES = {
    "number": ("POWER = {}", "x**POWER"),
    "function": ("def power():\n    return {}", "x ** power()"),
    "dictionary": ("POWER = {{'gate': {}, (1, 2): 1}}", "x ** POWER['gate']"),
    "tuple": ("POWER = ({}, 1.0)", "x ** POWER[0]"),
    "tensor": ("POWER = torch.tensor([{}])", "x ** POWER[0]"),
    "class": ("class Power:\n    value = {}", "x**Power.value"),
    "method": ("class Power(NamedTuple):\n    x: int\n\n    def of(self):\n        return self.x**{}", "Power(x).of()"),
    "base": ("class Base:\n    value = {}\n\n\nclass Power(Base):\n    other: int", "x**Power.value"),
    "cached": ("@functools.cache\ndef power():\n    return {}", "x ** power()"),
    "partial": ("def raised(x, p):\n    return x**p\n\n\npower = functools.partial(raised, p={})", "power(x)"),
    "argument": ("def raised(p, x):\n    return x**p\n\n\npower = functools.partial(raised, {})", "power(x)"),
    "of a partial": ("def raised(x):\n    return x**{}\n\n\npower = functools.partial(raised)", "power(x)"),
    "lambdas": ("one = lambda x: x**{}\nother = lambda x: x", "other(one(x)) + one(other(x))"),
}


@pytest.fixture
def code_in(tmp_path, monkeypatch):
    """Gives the code of `mine` in a module of a name and text."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def found(module_name: str, text: str) -> str:
        file = tmp_path / "module.py"
        file.write_text(HEAD + text)
        linecache.clearcache()
        spec = importlib.util.spec_from_file_location(module_name, file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, module_name, module)
        spec.loader.exec_module(module)
        return code_of(module.mine)

    return found


@pytest.mark.parametrize("module_name", ["dass.pruning.criteria", "stranger"])
@pytest.mark.parametrize("use", USES)
def test_who_edits_what_an_equation_uses_gets_another_run(code_in, module_name, use):
    defined, body = USES[use]
    texts = [f"{defined.format(n)}\n\n\ndef mine(x):\n    return {body}\n" for n in (2.0, 2.0, 3.0)]
    first, same, edited = (code_in(module_name, text) for text in texts)
    assert first == same != edited


def test_what_changes_no_number_is_the_same_code(code_in):
    """Comments, words, annotations, and a class that names fields alone; a class made by a call has no source."""
    text = 'class P(NamedTuple):\n    """A."""\n\n    x: int\n    """B."""\n\n\ndef mine(x: P) -> P:\n    return P(x)\n'
    others = [text.replace("A.", "C."), text.replace("B.", "C."), text.replace("x: P", "x: int"), text + "# D\n"]
    codes = [code_in("dass.pruning.criteria", one) for one in (text, *others)]
    assert codes[0] == codes[1] == codes[2] == codes[4] != codes[3]  # which stands in the function itself
    called = "Pair = namedtuple('Pair', 'a b')\n\n\ndef mine(x):\n    return Pair(x, x)\n"
    assert code_in("dass.pruning.criteria", called)
    several = "raised = functools.partial(\n    lambda x, p: x**p, p=2.0)\n\n\ndef mine(x):\n    return raised(x)\n"
    assert code_in("stranger", several)  # half a call is no code


def test_the_committed_records_are_of_this_code():
    """Where an equation changes by intent, its runs are made again."""
    methods = [record["determinants"].get("method") or {} for record in read_records(ROOT / "results" / "runs")]
    codes = {item for method in methods for item in method.get("code", {}).items()}
    codes |= {(f"{order['name']} (order)", order["code"]) for method in methods if (order := method.get("order"))}
    now = {name: code_of(entry.function) for name, entry in CRITERIA.items()}
    now |= {f"{name} (update)": code_of(entry.function) for name, entry in UPDATES.items()}
    now |= {f"{name} (order)": code_of(entry.function) for name, entry in ORDERS.items()}
    assert len(codes) > 10 and codes <= set(now.items())
