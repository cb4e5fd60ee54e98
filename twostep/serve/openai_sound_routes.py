"""The one address of OpenAI's API that answers sounds: /v1/audio/speech.

It was made for words that are read out; here `input` is the prompt of any model of sounds. As its
clients have it, the body of the answer is the file, WAV where nothing else is asked for. `voice`,
which they always send, is not read. Beyond the API's own fields `steps`, `seed`, `negative_prompt`
and `guidance_scale` are.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from twostep.contract import ContractError
from twostep.serve.catalogue import Wish
from twostep.serve.document import DRAWING, json_body, refusals
from twostep.serve.following import ended, in_header
from twostep.serve.items import FORMATS, encode
from twostep.serve.openai_bodies import OpenAiBody
from twostep.serve.serving import Serving, client_of, json_of, validated
from twostep.serve.shapes import SPEECH_PATH, SUFFIXES, file_stem


class SpeechBody(OpenAiBody):
    """What is read of a request; other fields are let through unread."""

    input: str
    response_format: str | None = None
    speed: float | None = None

    @property
    def format(self) -> str:
        """The format in which the sound is sent."""
        formats = FORMATS["audio"]
        return self.response_format if self.response_format in formats else formats[0]

    def notes(self) -> list[str]:
        """Return sentences about what this server does otherwise than the request has it."""
        notes = []
        if self.response_format not in (None, self.format):
            wished = str(self.response_format)[:80]
            notes.append(f"response_format {wished}: the sound is sent as {self.format}")
        if self.speed not in (None, 1):
            notes.append(f"speed {self.speed:g}: sounds have their own")
        return notes

    def wish(self) -> Wish:
        """Return what is to be made; a seed that is left out is picked."""
        return self.plain_wish(self.input)


def openai_sound_routes(serving: Serving) -> APIRouter:
    """Return the address."""
    router = APIRouter(tags=["OpenAI audio"], responses=refusals())
    sounds: dict[str, Any] = {mime: {} for mime in SUFFIXES if mime.startswith("audio/")}
    answered: dict[str, Any] = {
        "response_class": Response,
        "responses": {
            200: {"description": "The sound.", "content": sounds},
            **refusals(*DRAWING),
        },
    }

    @router.post(SPEECH_PATH, openapi_extra=json_body(SpeechBody), **answered)
    async def speech(http: HttpRequest) -> Response:
        """Make a sound of a prompt, and answer its file."""
        body = validated(SpeechBody, await json_of(http))
        fitted = await serving.fit(http, body.wish, media=("audio",))
        notes = body.notes()
        if serving.strict and notes:
            raise ContractError(f"{notes[0]}. This server is strict.")
        job = serving.submit(fitted, client=client_of(http))
        if not await ended(serving.engine, job, http):
            return Response(status_code=499)  # nobody reads it
        result = job.wait(0.0)
        file = await run_in_threadpool(encode, result, 0, body.format)
        name = file_stem(result.contract.name, result.seeds[0]) + file.suffix
        headers = {
            "X-Twostep-Job": job.id,
            "X-Twostep-Seed": str(result.seeds[0]),
            "Content-Disposition": f'inline; filename="{name}"',
        }
        changes = [*notes, *fitted.changes]
        if changes:
            headers["X-Twostep-Changes"] = in_header(changes)
        return Response(file.data, media_type=file.mime, headers=headers)

    return router
