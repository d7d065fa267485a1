"""The page that a browser gets at `/` until the web UI takes its place."""

from fastapi import APIRouter
from starlette.responses import HTMLResponse

router = APIRouter(include_in_schema=False)


@router.get("/")
async def index() -> HTMLResponse:
    return HTMLResponse("<!doctype html><title>MLX Manager</title>")
