"""Serving engines' own modules on a machine without their other dependencies: no server, no GPU, nothing copied.

The wheels are installed without dependencies (requirements/engines.txt). What their LoRA modules import and never call
here is stood in for: the HTTP, tokenizer, image and grammar libraries of the servers, and the packages of GPU kernels.
Nothing of an engine itself is, and neither are torch, triton, numpy, pydantic or transformers. Stand-ins stay as long as
the process, in which no other tests should run.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

import transformers.models.auto.image_processing_auto  # noqa: F401  before the finder: it asks what is installed

STAND_INS = frozenset(
    "IPython aiohttp cachetools cbor2 cloudpickle compressed_tensors einops fastapi llguidance openai openai_harmony orjson "
    "partial_json_parser prometheus_client pybase64 requests sentencepiece starlette torchvision tvm_ffi urllib3 uvloop "
    "xgrammar zmq".split()
)


class _Anything(type):
    """A class whose attributes, items, calls and subclasses are classes like it."""

    def __new__(cls, name, bases, namespace, **options):
        return super().__new__(cls, name, bases, namespace)

    def __init__(cls, name, bases, namespace, **options):
        super().__init__(name, bases, namespace)

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})

    def __getitem__(cls, item):
        return cls

    def __iter__(cls):  # else `in` would ask for one item after another
        return iter(())

    def __call__(cls, *args, **kwargs):
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else cls

    def __or__(cls, other):
        return cls

    __ror__ = __or__

    def __get_pydantic_core_schema__(cls, source, handler):
        from pydantic_core import core_schema

        return core_schema.any_schema()


class _StandIn(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {"__module__": self.__name__})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes last, so that what is installed is never stood in for."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in STAND_INS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(_Finder())
