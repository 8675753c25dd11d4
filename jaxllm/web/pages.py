"""The pages: files in static/, which load nothing from elsewhere."""

from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

_FILES = Path(__file__).parent / "static"


def routes(first: str, *names: str) -> list[Any]:
    """Routes of pages /NAME and of the files that they load; / leads to the first."""

    # The bar at the top of each page leads to the others.
    links = " ".join((first, *names))

    def page(name: str) -> Route:
        html = (_FILES / f"{name}.html").read_text().replace("PAGES", links)

        async def show(_: Request) -> HTMLResponse:
            return HTMLResponse(html, headers={"Cache-Control": "no-cache"})

        return Route(f"/{name}", show)

    async def home(_: Request) -> RedirectResponse:
        return RedirectResponse(f"/{first}")

    return [
        Route("/", home),
        *map(page, (first, *names)),
        Mount("/static", StaticFiles(directory=_FILES)),
    ]
