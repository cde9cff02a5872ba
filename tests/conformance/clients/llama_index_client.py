"""LlamaIndex's OpenAILike."""

from typing import Any

from checks import (
    BASE,
    MODEL,
    PERSON,
    PROMPT,
    STEERED,
    STEERING,
    TOKENS,
    URL,
    WEATHER,
    called,
    run,
    same,
)
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return city


def model(**fields: Any) -> OpenAILike:
    given: dict[str, Any] = {"max_tokens": TOKENS, **fields}
    return OpenAILike(
        model=MODEL,
        api_base=f"{URL}/v1",
        api_key="none",
        temperature=0,
        is_chat_model=True,
        is_function_calling_model=True,
        max_retries=0,
        **given,
    )


def asked() -> list[ChatMessage]:
    return [ChatMessage(role="user", content=PROMPT)]


def chat() -> None:
    same(model().chat(asked()).message.content, BASE)


def stream() -> None:
    same("".join(each.delta or "" for each in model().stream_chat(asked())), BASE)


def steering() -> None:
    steered = model(additional_kwargs={"extra_body": STEERING})
    same(steered.chat(asked()).message.content, STEERED)


def tool() -> None:
    asking = model(max_tokens=60)
    answer = asking.chat_with_tools(
        [FunctionTool.from_defaults(get_weather)], user_msg=WEATHER, tool_required=True
    )
    [call] = asking.get_tool_calls_from_response(answer)
    called(call.tool_name, call.tool_kwargs)


def structure() -> None:
    found = model(max_tokens=60).structured_predict(Person, PromptTemplate(PERSON))
    assert isinstance(found, Person)


run(chat=chat, stream=stream, steering=steering, tool=tool, structure=structure)
