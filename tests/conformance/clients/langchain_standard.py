"""langchain-tests' standard tests of a chat model, of ChatOpenAI with this server."""

import os
from typing import Any, ClassVar

from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

MODEL = os.environ["STEERSERVE_MODEL"]


class TestChatOpenAI(ChatModelIntegrationTests):
    """The tests, and what the server can do."""

    chat_model_class = ChatOpenAI
    supports_json_mode = True
    supports_model_override = True
    model_override_value = f"{MODEL}+detox-lineas"
    standard_chat_model_params: ClassVar[dict[str, Any]] = {}
    chat_model_params: ClassVar[dict[str, Any]] = {
        "base_url": f"{os.environ['STEERSERVE_URL']}/v1",
        "api_key": "none",
        "model": MODEL,
        "max_retries": 0,
        "max_completion_tokens": 100,
        "temperature": 0,
        "frequency_penalty": 1,  # greedily, a small model repeats a sentence without end
        "stream_usage": True,
    }
