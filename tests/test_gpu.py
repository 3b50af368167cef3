"""Bots with `num_gpus` run on the GPU that Ray has reserved, in the requested dtype."""

import pytest
import torch
from bot_fixtures import Bot, needs_gpu, reference
from callers import ChatCaller, HttpCaller
from ray import serve

from batchbot import Batchbot
from chatbot import Chatbot
from continuousbot import Continuousbot
from streaming_bots.models.loaded_model import load_model
from streaming_bots.models.source import BUNDLED, ModelError
from streaming_bots.settings import BotSettings
from textbot import Textbot


class Placed:
    def placement(self) -> tuple[str, str, int, bool]:
        """Return device and dtype of the weights, how many GPUs the replica sees, and whether
        torch may choose cuDNN's attention."""
        cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        return str(self.model.device), str(self.model.dtype), torch.cuda.device_count(), cudnn


class PlacedTextbot(Placed, Textbot.func_or_class):
    pass


class PlacedChatbot(Placed, Chatbot.func_or_class):
    pass


class PlacedBatchbot(Placed, Batchbot.func_or_class):
    pass


class PlacedContinuousbot(Placed, Continuousbot.func_or_class):
    pass


BOTS = {
    "textbot": (PlacedTextbot, Textbot),
    "chatbot": (PlacedChatbot, Chatbot),
    "batchbot": (PlacedBatchbot, Batchbot),
    "continuousbot": (PlacedContinuousbot, Continuousbot),
}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BOTS)
def test_a_bot_generates_on_the_gpu_that_is_reserved_for_it(port, loaded, name, dtype):
    placed, original = BOTS[name]
    arguments = BotSettings(model=BUNDLED, num_gpus=0.5, dtype=dtype)
    options = {"func_or_class": placed, **arguments.deployment_options()}
    app = original.options(**options).bind(**arguments.constructor_arguments())
    handle = serve.run(app, name="gpu", route_prefix="/gpu")
    try:
        placement = handle.placement.remote().result()
        assert placement == ("cuda:0", f"torch.{dtype}", 1, name == "continuousbot")
        bot = Bot(f"127.0.0.1:{port}/gpu/")
        caller = (ChatCaller if name == "chatbot" else HttpCaller)(bot, "Hello!")
        assert caller.outcome() == "finished"
        assert caller.text
        if dtype == "float32":
            assert caller.text == reference(loaded, ["Hello!"], 256)
    finally:
        serve.delete("gpu")


def test_a_model_is_on_the_cpu_unless_a_gpu_is_reserved():
    assert load_model(BUNDLED).model.device.type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU on this machine")
def test_a_reserved_gpu_that_torch_does_not_see_is_an_error_that_says_so(run_other):
    settings = BotSettings(model=BUNDLED, num_gpus=0.5)
    with pytest.raises(ModelError, match=r"sees none.*num_gpus=0"):
        run_other(Textbot.bind(**settings.constructor_arguments()))
