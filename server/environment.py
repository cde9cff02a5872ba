"""Reads settings from the environment, each from a variable that is named after its option."""

import os
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_settings import PydanticBaseSettingsSource, SettingsError

from server.variables import PREFIX, UnknownVariableError, read_variable, refuse_unknown


def takes_several(field: FieldInfo) -> bool:
    """Tell whether a setting holds several values, of which an option gives one at a time."""
    annotation = field.annotation
    return any(get_origin(part) is tuple for part in (annotation, *get_args(annotation)))


def option_name(name: str, field: FieldInfo) -> str:
    """Return the name of a setting's option, such as `served-model-name`."""
    return (name.removesuffix("s") if takes_several(field) else name).replace("_", "-")


def variable_name(name: str, field: FieldInfo) -> str:
    """Return the variable that is read for a setting, such as `STEERSERVE_SERVED_MODEL_NAME`."""
    return PREFIX + option_name(name, field).replace("-", "_").upper()


class Environment(PydanticBaseSettingsSource):
    """Gives each setting the text of its variable, and refuses variables that nobody reads."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return the variable's text (None if it is not set), and the setting's name."""
        return read_variable(variable_name(field_name, field)), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return the values of all settings that the environment sets.

        Raises:
            SettingsError: an unknown variable begins with `STEERSERVE_`.
        """
        fields = self.settings_cls.model_fields
        try:
            refuse_unknown(os.environ, [variable_name(*item) for item in fields.items()])
        except UnknownVariableError as error:
            raise SettingsError(str(error)) from error
        given = {}
        for name, field in fields.items():
            value, _, is_complex = self.get_field_value(field, name)
            if value is not None:
                given[name] = self.prepare_field_value(name, field, value, is_complex)
        return given
