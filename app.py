"""Stage 8: look at the results and at single scans in a browser.

Reads:   <results>/experiments.json, tables/, figures/, report.html, <data>/{test,val,train,unsplit}/,
         <models>/denoiser*.pt, classifier*.pt, segmenter*.pt, *.jsonl, *.card.json, scans below --scans
Writes:  nothing
Example: streamlit run app.py
         streamlit run app.py -- --data dataset --models saved_models --results results

Whatever is missing is left out, with the command that makes it. Research use only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import streamlit as st
from PIL import Image, ImageDraw

import stage
from app_files import Folders
from app_words import NOTICE, plain_text

STYLE = """<style>
.stMainBlockContainer { padding: 4.2rem 2rem 2rem; }
[data-testid="stMetricValue"] { font-size: 1.5rem; }
</style>"""  # of a screen 1280 px wide, as much as possible for the images
ICONS = {  # of each page, by its title; the address is the title too
    "Overview": "analytics",
    "Cases": "list",
    "Viewer": "radiology",
    "Experiments": "labs",
    "Training": "monitoring",
    "Models": "badge",
    "Own scan": "upload_file",
}


def page_of(title: str) -> Callable[..., None]:
    """The function of a page. Imported when it is opened: torch alone takes longer than a page should."""
    if title == "Overview":
        from app_results import overview_page as page
    elif title == "Cases":
        from app_cases import cases_page as page
    elif title == "Viewer":
        from app_viewer import viewer_page as page
    elif title == "Experiments":
        from app_results import experiments_page as page
    elif title == "Training":
        from app_runs import training_page as page
    elif title == "Models":
        from app_runs import models_page as page
    else:
        from app_scan import own_scan_page as page
    return page


def get_parser() -> stage.StageParser:
    parser = stage.StageParser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("dataset"), help="prepared data (default: dataset)")
    parser.add_argument(
        "--models", type=Path, default=Path("saved_models"), help="checkpoints (default: saved_models)"
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="results (default: results)")
    parser.add_argument(
        "--scans", type=Path, help="folder below which users may open scans (default: uploads alone)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser


def show(page: Callable[..., None], *given: object) -> None:
    """A page above the notice; whatever goes wrong in it becomes one line."""
    try:
        page(*given)
    except (stage.StageError, ValueError) as error:
        st.error(plain_text(error))
    except OSError as error:
        st.error(plain_text(f"{error.filename or 'file'}: {error.strerror or error}"))
    except Exception as error:  # noqa: BLE001 the border: the page ends in one line, the server's log has the rest
        stage.log.exception("%s failed", page.__name__)
        st.error(plain_text(f"{type(error).__name__}: {error}"))
    st.caption(f"Low-dose head CT · **{NOTICE}**, not a medical device")


def main(argv: list[str] | None = None) -> None:
    st.set_page_config("Low-dose head CT", icon(), layout="wide")
    st.html(STYLE)
    try:
        args = get_parser().parse_args(argv)
        if args.scans is not None and not args.scans.is_dir():
            raise stage.InputError(f"--scans {args.scans}: no such folder")
    except stage.StageError as error:
        st.error(plain_text(error))
        return
    except SystemExit:  # --help
        st.code(get_parser().format_help(), language=None)
        return
    folders = Folders(args.data, args.models, args.results, args.device, args.scans)
    pages: dict[str, st.Page] = {}

    def run(title: str) -> None:
        show(page_of(title), folders, *([pages["Viewer"]] if title == "Cases" else []))

    for title, name in ICONS.items():
        pages[title] = st.Page(
            lambda title=title: run(title),
            title=title,
            icon=f":material/{name}:",
            url_path=title.lower().replace(" ", "-"),
            default=title == "Overview",
        )
    st.navigation(list(pages.values()), position="top").run()


def icon() -> Image.Image:
    """A skull from above. Streamlit would fetch the icon of a page from a foreign host."""
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).ellipse((12, 4, 52, 60), fill=(90, 90, 90), outline=(230, 159, 0), width=6)
    return image


def start() -> None:
    """What `python app.py` does: a browser needs Streamlit's server."""
    get_parser().parse_args()
    raise stage.InputError("the app runs in Streamlit: streamlit run app.py -- --data dataset")


if __name__ == "__main__":
    if st.runtime.exists():
        main()
    else:
        stage.run(start)
