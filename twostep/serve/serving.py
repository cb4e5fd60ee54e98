"""What every family of addresses needs: the engine, the catalogue, and how jobs are made."""

from collections.abc import Callable
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest

from twostep.pipeline.request import Picture
from twostep.serve.catalogue import Catalogue, Fitted, Wish
from twostep.serve.engine import Engine, Job


@dataclass(frozen=True)
class Serving:
    """A server's engine and catalogue, and whether it refuses what it would have to change."""

    engine: Engine
    catalogue: Catalogue
    strict: bool = False

    async def accept(
        self,
        http: HttpRequest,
        make: Callable[[], Wish],
        *,
        strict: bool | None = None,
        wants_previews: bool = False,
        seconds: float | None = None,
    ) -> tuple[Job, Fitted]:
        """Make a wish, which may open pictures, in another thread; fit it and queue it.

        Raises what `Catalogue.fit` and `Engine.submit` raise, and RequestError for pictures.
        """
        wish = await run_in_threadpool(make)
        fitted = self.catalogue.fit(wish, strict=self.strict if strict is None else strict)
        job = self.engine.submit(
            fitted.request,
            client=client_of(http),
            wants_previews=wants_previews,
            seconds=seconds,
        )
        return job, fitted


def client_of(http: HttpRequest) -> str:
    """Return whose turn a request takes: what it calls itself, or the address it comes from."""
    name = http.headers.get("x-twostep-client")
    if name:
        return name[:100]
    return http.client.host if http.client else ""


def picture_of(data: bytes | None) -> Picture | None:
    """Open an uploaded picture; raises RequestError where it is none, or too small or large."""
    return None if data is None else Picture.of(data)
