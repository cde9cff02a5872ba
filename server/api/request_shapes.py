"""The types of the request fields that are parsed by hand, for the API's documentation only."""

from typing import Annotated, Literal, NotRequired, TypeAlias

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from server.api.messages import MAX_CALLS
from server.api.steering_resolver import MAX_STACK
from steering.settings import Positions

PromptShape: TypeAlias = str | list[int] | list[str] | list[list[int]]
StopShape: TypeAlias = str | list[str]
LogitBiasShape: TypeAlias = dict[str, float]


@with_config(ConfigDict(extra="ignore"))
class TextPart(TypedDict):
    """One part of a message's content; text is the only kind of part."""

    type: Literal["text"]
    text: str


@with_config(ConfigDict(extra="ignore"))
class CalledFunction(TypedDict):
    """A function that the assistant has called."""

    name: str
    arguments: str  # the text of a JSON object


@with_config(ConfigDict(extra="ignore"))
class CallShape(TypedDict):
    """A call in a message of the assistant."""

    id: str
    type: NotRequired[Literal["function"]]
    function: CalledFunction


@with_config(ConfigDict(extra="ignore"))
class MessageShape(TypedDict):
    """One message of a conversation; it may have further fields of OpenAI's."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: NotRequired[str | list[TextPart] | None]  # needed unless the message calls tools
    name: NotRequired[str | None]
    reasoning_content: NotRequired[str | None]
    tool_calls: NotRequired[Annotated[list[CallShape], Field(max_length=MAX_CALLS)] | None]
    tool_call_id: NotRequired[str | None]  # of a tool's message


@with_config(ConfigDict(extra="ignore"))
class InputPart(TypedDict):
    """One part of an item's content; text is the only kind of part."""

    type: Literal["input_text", "output_text", "text", "reasoning_text"]
    text: str


@with_config(ConfigDict(extra="ignore"))
class MessageItem(TypedDict):
    """One message of an input."""

    type: NotRequired[Literal["message"]]
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]


@with_config(ConfigDict(extra="ignore"))
class ReasoningItem(TypedDict):
    """The reasoning of an earlier answer."""

    type: Literal["reasoning"]
    content: NotRequired[list[InputPart] | None]


@with_config(ConfigDict(extra="ignore"))
class CallItem(TypedDict):
    """A call of a tool in an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str  # the text of a JSON object


@with_config(ConfigDict(extra="ignore"))
class ResultItem(TypedDict):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputPart]


InputShape: TypeAlias = str | list[MessageItem | ReasoningItem | CallItem | ResultItem]


@with_config(ConfigDict(extra="forbid"))
class SteeringItem(TypedDict):
    """One intervention and its settings; the artifact has defaults for settings left out."""

    intervention: str
    strength: NotRequired[float]
    positions: NotRequired[Positions]
    eta: NotRequired[float]
    iterations: NotRequired[int]
    direction_scale: NotRequired[float]


SteeringShape: TypeAlias = (
    SteeringItem | Annotated[list[SteeringItem], Field(max_length=MAX_STACK)] | None
)
