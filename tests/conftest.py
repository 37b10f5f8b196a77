"""pytest --gpu runs the kernels on a GPU; without it Triton's interpreter runs them on the CPU."""

import os
from hashlib import sha256
from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings

# No deadline: a first call loads the kernels. Chosen by --hypothesis-profile.
settings.register_profile("few", max_examples=320, derandomize=True, database=None, deadline=None)
settings.register_profile("many", max_examples=10_000, print_blob=True, deadline=None)
settings.load_profile("few")

pytest.register_assert_rewrite("checks", "closeness")
# By path: once tests/integrations is on sys.path, that folder is a package of the name vllm where none is installed.
collect_ignore = [] if find_spec("vllm") else ["integrations/vllm"]


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run the kernels on a GPU, in bfloat16 too")
    parser.addoption("--share", type=int, default=1, metavar="N", help="one test in N, by a hash of id and salt")
    parser.addoption("--salt", default="", help="of --share: another salt, other tests; the same one, the same tests")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs --gpu")
    config.addinivalue_line("markers", "every(n): of its parameters' combinations one in n is quick, the rest slow")
    if config.getoption("--gpu"):
        assert torch.cuda.is_available(), "--gpu: no GPU is visible to torch"
        config.pluginmanager.register(TellsAtOnce())
    else:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Before -m chooses: what every(n) leaves out is slow. Diagonals are quick: each value with some of the others."""
    places = {}
    for item in items:
        if not config.getoption("--gpu") and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs --gpu"))
        every = item.get_closest_marker("every")
        if every is not None:
            found = [places.setdefault((item.function, name), {}) for name in item.callspec.params]
            of_values = [own.setdefault(id(x), len(own)) for own, x in zip(found, item.callspec.params.values())]
            if sum(of_values) % every.args[0]:
                item.add_marker(pytest.mark.slow)
    share, salt = config.getoption("--share"), config.getoption("--salt")
    left_out = {item for item in items if int(sha256(f"{salt} {item.nodeid}".encode()).hexdigest(), 16) % share}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


class TellsAtOnce:
    """Failures as they come: a GPU's time may be up before the end, where pytest tells them."""

    def pytest_runtest_logreport(self, report):
        if report.failed:
            print(f"\n{report.nodeid}\n{report.longreprtext[-1500:]}", flush=True)


def pytest_generate_tests(metafunc):
    """Kernels meet bfloat16 on a GPU only: the interpreter computes it wrongly, without an error."""
    if "kernel_dtype" in metafunc.fixturenames:
        dtypes = [torch.float32, torch.float16]
        if metafunc.config.getoption("--gpu"):
            dtypes.append(torch.bfloat16)
        metafunc.parametrize("kernel_dtype", dtypes, ids=lambda d: str(d).split(".")[-1])


@pytest.fixture
def fresh_dynamo(request):
    """A model compiled anew, on the CPU, and nothing left of it."""
    from torch._dynamo.utils import counters  # which takes a second to load

    if request.config.getoption("--gpu"):
        pytest.skip("the model is on the CPU, where kernels are interpreted only")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def device(request):
    return torch.device("cuda" if request.config.getoption("--gpu") else "cpu")
