"""The page that a browser gets at `/` until the web UI takes its place: what is running, and how to connect an app.

Public even with an API key: then it tells nothing about this server but its address, and its script asks for the key.
"""

from hashlib import sha256
from mimetypes import guess_type
from pathlib import Path

from fastapi import APIRouter, Request
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from mlx_manager.api.dependencies import ServicesDep
from mlx_manager.api.system import ServerStatus, status

router = APIRouter(include_in_schema=False)

_FOLDER = Path(__file__).parent / "page"
_FILES = {name: (_FOLDER / name).read_bytes() for name in ("page.css", "page.js", "icon.svg")}
# What changes has another address, so that an update never meets the style or script of the version before.
_ADDRESSES = {name: f"/static/{name}?v={sha256(content).hexdigest()[:12]}" for name, content in _FILES.items()}
_TEMPLATE = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined).get_template("index.html")

UNKNOWN_MODEL = "MODEL"


def page(root: str, now: ServerStatus | None) -> str:
    """`root` is this server as the browser called it; `now` is None where a key is needed to see it."""
    # One that is loaded answers at once.
    models = sorted(now.models, key=lambda model: model.state != "ready") if now else []
    return _TEMPLATE.render(
        root=root,
        needs_key=now is None,
        status=now.model_dump_json() if now else None,
        model=next((model.id for model in models if model.kind == "text"), UNKNOWN_MODEL),
        files=_ADDRESSES,
    )


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request, services: ServicesDep) -> HTMLResponse:
    now = await status(services) if services.config.api_key is None else None
    root = f"{request.url.scheme}://{request.url.netloc}"
    return HTMLResponse(page(root, now), headers={"cache-control": "no-cache"})


@router.api_route("/static/{name}", methods=["GET", "HEAD"])
async def static_file(name: str) -> Response:
    """One of the files read at the start; the name is looked up, and is no path."""
    if name not in _FILES:
        raise HTTPException(404)
    media_type, _ = guess_type(name)
    return Response(_FILES[name], media_type=media_type, headers={"cache-control": "public, max-age=3600"})
