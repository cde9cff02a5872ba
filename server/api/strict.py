"""The base of all objects in requests, and the check of fields that are not implemented."""

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from server.api.parsing import UNSUPPORTED


def only_neutral(name: str, *neutral: object) -> AfterValidator:
    """Make a validator of an unimplemented field, which takes only values that ask for nothing."""

    def check(value: object) -> object:
        if value not in neutral:
            message = "This server does not support '{name}'."
            raise PydanticCustomError(UNSUPPORTED, message, {"name": name})
        return value

    return AfterValidator(check)


class Strict(BaseModel):
    """An object in a request's body. As with OpenAI, null means that a field is not given."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, fields: object) -> object:
        if not isinstance(fields, dict):
            return fields
        return {
            name: value
            for name, value in fields.items()
            if value is not None or cls._keeps_null(name)
        }

    @classmethod
    def _keeps_null(cls, name: str) -> bool:
        """Tell whether a null is kept, either as the field's value or to be refused."""
        fields = cls.model_fields.items()
        field = next((each for own, each in fields if name == (each.alias or own)), None)
        return field is None or field.is_required() or name == "steering"
