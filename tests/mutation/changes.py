"""The changes of one module: mutmut's operators on every expression inside a function.

Left out: annotations, decorators, text (a message's wording), calls without one of their arguments
(most of them are parts of messages too), ``strict=True`` of zip, which cannot fail where it stands,
and ``sample_inputs``, which makes the inputs of tests.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import libcst
from libcst.metadata import CodeRange, MetadataWrapper, PositionProvider

LEFT_OUT = {
    "operator_string",
    "operator_dict_arguments",
    "operator_arg_removal",
    "operator_lambda",
    "operator_assignment",
}


@dataclass(frozen=True)
class Mutant:
    """One change of one file: ``node`` of ``tree`` becomes ``changed``.

    ``function``: the first and the last line of the innermost function around it.
    """

    path: Path
    line: int
    function: tuple[int, int]
    tree: libcst.Module
    node: libcst.CSTNode
    changed: libcst.CSTNode

    @property
    def source(self) -> str:
        """The changed file. Made on demand: it takes much longer than finding the place."""
        mutated = self.tree.deep_replace(self.node, self.changed)
        assert isinstance(mutated, libcst.Module)
        return mutated.code

    def __str__(self) -> str:
        before, after = (self.tree.code_for_node(part) for part in (self.node, self.changed))
        return f"{_one_line(before)} -> {_one_line(after)}"


class _Places(libcst.CSTVisitor):
    """Collects (node, changed node, line, function) for every change."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        from mutmut.mutation.mutators import mutation_operators

        self.operators = [
            (kind, operator)
            for kind, operator in mutation_operators
            if operator.__name__ not in LEFT_OUT
        ]
        # First and last line of the functions around the place, the innermost last.
        self.around: list[tuple[int, int]] = []
        self.found: list[tuple[libcst.CSTNode, libcst.CSTNode, int, tuple[int, int]]] = []

    def lines_of(self, node: libcst.CSTNode) -> tuple[int, int]:
        place = self.get_metadata(PositionProvider, node)
        assert isinstance(place, CodeRange)
        return place.start.line, place.end.line

    def visit_FunctionDef(self, node: libcst.FunctionDef) -> bool:
        self.around.append(self.lines_of(node))
        return node.name.value != "sample_inputs"

    def leave_FunctionDef(self, original_node: libcst.FunctionDef) -> None:
        self.around.pop()

    def visit_Annotation(self, node: libcst.Annotation) -> bool:
        return False

    def visit_Arg(self, node: libcst.Arg) -> bool:
        return node.keyword is None or node.keyword.value != "strict"

    def visit_Decorator(self, node: libcst.Decorator) -> bool:
        return False

    def on_visit(self, node: libcst.CSTNode) -> bool:
        if self.around and not isinstance(node, libcst.Annotation | libcst.Decorator):
            for kind, operator in self.operators:
                if isinstance(node, kind):
                    for changed in operator(node):
                        line, _ = self.lines_of(node)
                        self.found.append((node, changed, line, self.around[-1]))
        return super().on_visit(node)


def path_of(module: str) -> Path:
    """The file of a module, found on the path without importing its packages."""
    parts = module.split(".")
    for folder in sys.path:
        path = Path(folder or ".", *parts).with_suffix(".py").absolute()
        if path.is_file():
            return path
    raise ModuleNotFoundError(f"no file of module {module}")


def mutants_of(module: str) -> list[Mutant]:
    """Every mutant of ``module``, in the order of its file."""
    path = path_of(module)
    wrapper = MetadataWrapper(libcst.parse_module(path.read_text(encoding="utf-8")))
    places = _Places()
    wrapper.visit(places)
    return [
        Mutant(path, line, function, wrapper.module, node, changed)
        for node, changed, line, function in places.found
    ]


def _one_line(code: str) -> str:
    words = " ".join(code.split())
    return words if len(words) <= 60 else f"{words[:57]}..."
