"""The multipart form of /v1/images/edits: files `image` or `image[]`, repeated for several pictures, a `mask`, and text fields."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.datastructures import StarletteUploadFile as UploadFile
from fastapi.exceptions import StarletteHTTPException

from hyperbagel.serve.schemas import ApiError, EditFields, Limits

IMAGE_NAMES = {"image", "image[]"}
IGNORED = {name for name, field in EditFields.model_fields.items() if field.annotation is Any}
# Fields with several values, which may be sent as interval=0&interval=1, interval[]=0&interval[]=1, interval=0,1 or interval=[0,1].
LISTS = {"interval"}


def _form_schema() -> dict[str, Any]:
    """The form's fields and files for the OpenAPI schema, as `openapi_extra` of the endpoint."""
    schema = EditFields.model_json_schema()
    for field in schema["properties"].values():  # a form has no null: a field that is not sent is absent
        kinds = [kind for kind in field.pop("anyOf", ()) if kind != {"type": "null"}]
        field |= kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {}
        field.pop("default", None)
    file = {"type": "string", "format": "binary", "description": "A picture; may be repeated."}
    schema["properties"] |= {"mask": file | {"description": "Of the first picture's size; what is transparent may change."}}
    schema["properties"] |= {"image": file, "image[]": {"type": "array", "items": file, "minItems": 1}}
    schema["anyOf"] = [{"required": ["image"]}, {"required": ["image[]"]}]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


EDIT_FORM = _form_schema()


async def read_edit(request: Request, limits: Limits) -> tuple[EditFields, list[bytes], bytes | None]:
    """The fields, the pictures' bytes in order, and the mask's bytes. Raises ApiError or pydantic's ValidationError."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "got another content type, expected multipart/form-data; send the picture as the file 'image'")
    files: list[bytes] = []
    mask: bytes | None = None
    fields: dict[str, Any] = {}
    try:
        async with request.form(max_files=limits.images + 2, max_fields=200, max_part_size=2**20) as form:
            for key, value in form.multi_items():
                if isinstance(value, str):
                    _add(fields, key.removesuffix("[]"), value)
                elif key == "mask":
                    if mask is not None:
                        raise ApiError(400, "got 'mask' twice, expected it once; put all that may change into one mask", param="mask")
                    mask = await value.read()
                else:
                    files.append(await _file(key, value))
    except StarletteHTTPException as error:  # a broken form, or more parts than allowed
        raise ApiError(400, f"got a form that cannot be read ({error.detail}), expected multipart/form-data") from error
    if not files:
        raise ApiError(400, "got no picture, expected at least one file named image", param="image")
    if len(files) > limits.images:
        raise ApiError(400, f"got {len(files)} pictures, expected at most {limits.images}", param="image")
    return EditFields.model_validate(fields), files, mask


def _add(fields: dict[str, Any], name: str, value: str) -> None:
    if name in IGNORED:  # whatever its value, and however often it is sent
        return
    if name in LISTS:
        fields.setdefault(name, []).extend(value.strip("[] ").split(","))
    elif name in fields:
        raise ApiError(400, f"got {name!r} twice, expected it once", param=name)
    else:
        fields[name] = value


async def _file(key: str, file: UploadFile) -> bytes:
    if key not in IMAGE_NAMES:
        raise ApiError(400, f"got a file named {key!r}, expected image, image[] or mask", param=key)
    return await file.read()
