"""What the package's source may contain."""

import ast
import contextlib
import functools
import graphlib
import importlib
import inspect
import pathlib

import keras
import mutations
import pytest
import test_keras_internals

import keras_adafisher
from keras_adafisher import analysis
from keras_adafisher import callbacks
from keras_adafisher import optimizer
from keras_adafisher import wrappers

FOLDER = pathlib.Path(keras_adafisher.__file__).parent
TESTS = pathlib.Path(__file__).parent
SOURCES = {
    path.relative_to(FOLDER).as_posix(): ast.parse(path.read_text())
    for path in sorted(FOLDER.rglob("*.py"))
}
NODES = [(file, node) for file in SOURCES for node in ast.walk(SOURCES[file])]

# The private names of Keras that the package uses, and the test in
# `test_keras_internals.py` that fails if Keras moves one.
KERAS_INTERNALS = {
    # Read or called.
    "_flatten_layers": "test_layer_flatten_layers",
    "_value": "test_variable_value",
    "_get_variable_index": "test_optimizer_get_variable_index",
    "_trainable_variables": "test_optimizer_get_variable_index",
    "_iterations": "test_optimizer_iterations",
    "_use_weight_decay": "test_optimizer_use_weight_decay",
    "_optimizer_map": "test_multi_optimizer_optimizer_map",
    "_model_variables_moving_average": (
        "test_optimizer_model_variables_moving_average"
    ),
    "_accumulated_gradients": "test_optimizer_backend_gradient_accumulators",
    # Overridden.
    "_update_model_variables_moving_average": (
        "test_optimizer_update_model_variables_moving_average"
    ),
    "_apply_weight_decay": "test_optimizer_apply_weight_decay",
    "_backend_update_step": "test_optimizer_backend_update_step",
    "_backend_increment_gradient_accumulators": (
        "test_optimizer_backend_gradient_accumulators"
    ),
    "_backend_reset_gradient_accumulators": (
        "test_optimizer_backend_gradient_accumulators"
    ),
    # Imported.
    "keras.src.backend.common.stateless_scope.in_stateless_scope": (
        "test_in_stateless_scope"
    ),
    "keras.src.backend.common.masking.get_keras_mask": (
        "test_keras_masks_of_tensors"
    ),
    "keras.src.backend.common.masking.set_keras_mask": (
        "test_keras_masks_of_tensors"
    ),
}
if keras.backend.backend() == "tensorflow":
    # Where Keras has it. Overridden.
    KERAS_INTERNALS["_distributed_tf_update_step"] = (
        "test_optimizer_distributed_tf_update_step"
    )
# PyTorch's own besides its multi-tensor operations, `_foreach_...`: run by
# `test_distributed_torch.py`.
# The others are in `test_torch_autodiff.py` and `test_torch_counter.py`.
TORCH_INTERNALS = {
    "_C",
    "_active_ddp_module",
    "_join_config",
    "_are_functorch_transforms_active",
    "_current_graph_task_id",
    "_version",
    "_will_engine_execute_node",
}


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def own_names():
    """Private names that the package itself defines."""
    names = set()
    for _, node in NODES:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.For):
            single = getattr(node, "target", None)
            for target in [single] if single else node.targets:
                for each in ast.walk(target):
                    if isinstance(each, ast.Name):
                        names.add(each.id)
                    # What others keep for themselves is no name of ours.
                    if isinstance(each, ast.Attribute) and (
                        isinstance(each.value, ast.Name)
                        and each.value.id == "self"
                    ):
                        names.add(each.attr)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
    return names


@functools.cache
def an_optimizer():
    """One with all of its attributes."""
    optimizer = keras.optimizers.SGD(
        use_ema=True, gradient_accumulation_steps=2
    )
    optimizer.build([keras.Variable([1.0])])
    return optimizer


@functools.cache
def keras_has(name):
    classes = keras.optimizers.Optimizer, keras.layers.Layer, keras.Model
    return any(hasattr(each, name) for each in (an_optimizer(), *classes))


def foreign_private_names():
    """Dict of private names that others define to the files that use them."""
    own = {name for name in own_names() if not keras_has(name)}
    found = {}
    for file, node in NODES:
        names = []
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            names = [node.attr]
        elif isinstance(node, ast.FunctionDef) and keras_has(node.name):
            names = [node.name] if is_private(node.name) else []
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            is_internal = "src" in parts or any(map(is_private, parts))
            names = [
                f"{node.module}.{alias.name}"
                for alias in node.names
                if is_internal
                or (
                    is_private(alias.name)
                    and not node.module.startswith("keras_adafisher")
                )
            ]
        elif isinstance(node, ast.Import):
            names = [
                a.name
                for a in node.names
                if "src" in a.name.split(".")
                or any(map(is_private, a.name.split(".")))
            ]
        elif isinstance(node, ast.Call) and (
            isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "setattr", "hasattr", "delattr")
            and isinstance(node.args[1], ast.Constant)
            and is_private(node.args[1].value)
        ):
            names = [node.args[1].value]
        for name in names:
            if name not in own:
                found.setdefault(name, set()).add(file)
    return found


def test_every_private_name_of_keras_is_listed_and_has_a_test():
    found = foreign_private_names()
    others = {
        name
        for name, files in found.items()
        if all(pathlib.Path(file).stem.startswith("torch") for file in files)
        and (name in TORCH_INTERNALS or name.startswith("_foreach_"))
    }
    # Of named tuples, and documented.
    others.add("_fields")
    assert set(found) - others == set(KERAS_INTERNALS)
    for test in KERAS_INTERNALS.values():
        assert callable(getattr(test_keras_internals, test))


# What runs code or reads what may hold code.
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "input", "open"}
FORBIDDEN_MODULES = {
    "cloudpickle",
    "ctypes",
    "dill",
    "importlib",
    "joblib",
    "marshal",
    "os",
    "pickle",
    "runpy",
    "shelve",
    "shutil",
    "socket",
    "subprocess",
    "urllib",
    "yaml",
}
FORBIDDEN_ATTRIBUTES = {
    "enable_unsafe_deserialization",
    "deserialize_keras_object",
    "loads",
    "system",
    "popen",
}


@pytest.mark.once
@pytest.mark.parametrize("file", SOURCES)
def test_nothing_evaluates_or_unpickles_anything(file):
    """Nor does it start anything, or touch files but those of callbacks."""
    for node in ast.walk(SOURCES[file]):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            if modules == ["os"]:
                # Reading the environment is no harm.
                assert [alias.name for alias in node.names] == ["environ"]
                modules = []
        for module in modules:
            assert module.split(".")[0] not in FORBIDDEN_MODULES
        if isinstance(node, ast.Name):
            assert node.id not in FORBIDDEN_CALLS
        if isinstance(node, ast.Attribute):
            assert node.attr not in FORBIDDEN_ATTRIBUTES
            # `torch.load`, `numpy.load`.
            assert node.attr != "load"


@pytest.mark.once
def test_no_public_name_hides_a_module():
    """`keras_adafisher.wrap` is the function, whoever imports what first."""
    modules = {path.stem for path in FOLDER.iterdir()} - {"__init__"}
    assert not modules & set(keras_adafisher.__all__)


def public_functions():
    """Names of public functions and methods to what they are."""
    modules = [keras_adafisher, analysis, callbacks, optimizer, wrappers]
    with contextlib.suppress(ImportError):
        # Needs matplotlib.
        modules.append(importlib.import_module("keras_adafisher.plotting"))
    found = {}
    for module in modules:
        for name in module.__all__:
            public = getattr(module, name)
            members = {name: public}
            if inspect.isclass(public):
                members = {
                    f"{name}.{member}": inspect.getattr_static(public, member)
                    for member in dir(public)
                    if member == "__init__" or not member.startswith("_")
                }
            for path, member in members.items():
                if isinstance(member, property):
                    member = member.fget
                member = inspect.unwrap(getattr(member, "__func__", member))
                if inspect.isfunction(member) and (
                    member.__module__.startswith("keras_adafisher.")
                ):
                    found[f"{module.__name__}.{path}"] = member
    return found


@pytest.mark.once
def test_public_names_have_type_annotations():
    """`py.typed` says so. Whether they are right is for `make lint`."""
    assert (FOLDER / "py.typed").exists()
    found = public_functions()
    assert "keras_adafisher.wrap" in found
    assert "keras_adafisher.AdaFisherMuon.__init__" in found
    assert "keras_adafisher.AdaFisher.as_published" in found
    missing = []
    for name, function in found.items():
        signature = inspect.signature(function)
        parameters = dict(signature.parameters)
        if "." in function.__qualname__:
            # Also of class methods, seen without their class.
            del parameters[next(iter(parameters))]
        annotations = [each.annotation for each in parameters.values()]
        annotations.append(signature.return_annotation)
        # `inspect` has one mark for both.
        if inspect.Signature.empty in annotations:
            missing.append(name)
    assert not missing


def imports_of(file):
    """The files of the package that a file imports while it is imported."""
    for node in SOURCES[file].body:
        if isinstance(node, ast.ImportFrom) and node.module:
            package, *parts = node.module.split(".")
            if package != "keras_adafisher":
                continue
            for alias in node.names:
                for names in ([*parts, alias.name], parts):
                    path = "/".join(names)
                    found = {f"{path}.py", f"{path}/__init__.py"} & set(SOURCES)
                    if found:
                        yield found.pop()
                        break


@pytest.mark.once
def test_no_modules_import_each_other():
    graph = {file: set(imports_of(file)) for file in SOURCES}
    assert "statistics.py" in graph["wrappers/block.py"]
    # Raises a `CycleError`, which names them.
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.once
def test_the_checks_see_what_they_are_for():
    """So they don't pass because they look at nothing."""
    assert "optimizer/adafisher.py" in SOURCES
    assert "wrappers/dense.py" in SOURCES
    assert "_flatten_layers" in foreign_private_names()


@pytest.mark.once
def test_every_mutation_is_one():
    """What `make mutations` breaks is there. The rest takes half an hour."""
    for mutation in mutations.MUTATIONS:
        text = (FOLDER / mutation.file).read_text()
        assert text.count(mutation.old) == 1, mutation
        assert mutation.new != mutation.old
        for name in mutation.tests.split():
            assert (TESTS / f"{name}.py").exists(), name
