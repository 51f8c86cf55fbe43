"""What a pass is: a frozen dataclass from module to module, whose fields are its options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from typing import ClassVar, get_type_hints

from ..ir.module import LEVELS, Module

#: types an option may have; they are the ones that the pipeline's text form can hold
OptionValue = bool | int | float | str
OPTION_TYPES: tuple[type, ...] = (bool, int, float, str)


@dataclass(frozen=True)
class Pass(ABC):
    """One step of the compiler.

    A subclass is a frozen dataclass; its fields of type bool, int, float or str are its options in
    the pipeline's text form (`passes/pipeline.py`), and each has a default. Its docstring shows the
    IR before and after. A pass never changes the module that it is given.

    Attributes:
        name: the name in a pipeline, unique in `passes/registry.py`.
        summary: one line, shown by the command line.
        levels: the levels of the modules that it takes.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    levels: ClassVar[tuple[str, ...]] = LEVELS

    def __init_subclass__(cls) -> None:
        if not cls.name or not cls.summary:
            raise TypeError(f"pass {cls.__name__} needs a name and a summary")

    @abstractmethod
    def run(self, module: Module) -> Module:
        """The module after the pass. Raises CompileError."""

    def options(self) -> dict[str, OptionValue]:
        """The options that differ from their defaults, in the order of the fields."""
        return {
            name: getattr(self, name)
            for name, (_, default) in option_specs(type(self)).items()
            if getattr(self, name) != default
        }


@lru_cache(maxsize=None)
def option_specs(cls: type[Pass]) -> dict[str, tuple[type, OptionValue]]:
    """Type and default of each option of a pass, in the order of the fields."""
    hints = get_type_hints(cls)
    specs: dict[str, tuple[type, OptionValue]] = {}
    for field in fields(cls):
        kind = hints[field.name]
        if kind in OPTION_TYPES:
            if field.default is MISSING:
                raise TypeError(f"option {field.name} of pass {cls.name} needs a default")
            specs[field.name] = (kind, field.default)
    return specs
