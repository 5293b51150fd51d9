"""The report of a study: one HTML page with its answer and every figure and table.

All numbers come from the tables of tables.py; here they are chosen, put in words and laid out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

import figures
import gallery
import methods
import metrics
import stage
from arms import Family, family_name
from cells import Cell
from explain import FULL_HEAT
from figures import NAMES, Answers, Look, Volumes, dose_words, known, stratum_words
from inference import LEGEND
from metrics import shown
from page import Page, paragraph, section
from study import LEVELS, PRIMARY_LEVEL, Study
from wording import answer, dose_of, p_value, range_of, rounded, signed, with_interval

STYLE_SHEET = Path(__file__).with_suffix(".css")
FAILURES = 8  # shown: a page or two
LISTED = 40  # rows of a long table; its file has all
FIGURES = (  # how the names of figures begin
    *("dose_response", "strata", "non_inferiority", "image_", "noise_spectra", "roc_", "reliability"),
    *("calibration", "segmentation", "bland_altman", "stress", "external", "seed_", "failure_"),
)

# ---------------------------------------------------------------- the parts of the report


class Report:
    """The parts of a report; each method gives a title and its HTML, empty where its tables are."""

    def __init__(self, page: Page, study: Study, manifest: dict, found: dict[str, list[dict]]):
        self.page, self.study, self.manifest, self.found = page, study, manifest, found
        self.arms = figures.arm_looks(list(study.labels.values()))
        self.images: dict[str, Look] = figures.image_looks(
            ["none", *(denoiser.path.name for denoiser in study.networks.denoisers)]
        )

    def groups(self, name: str, **wanted: Any) -> Iterable[tuple[str, str, list[dict]]]:
        """(what tells its figure apart, what it is about, rows) of a table for each task and dose model."""
        rows = [row for row in self.found.get(name, []) if all(row[key] == wanted[key] for key in wanted)]
        every = self.found.get(name, [])
        keys = [key for key in ("task", "dose_model") if every and key in every[0]]
        several = [key for key in keys if len({row[key] for row in every}) > 1]
        for values in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
            own = [row for row in rows if tuple(row[key] for key in keys) == values]
            parts = [own[0][key] for key in several]
            yield "".join(f"_{part}" for part in parts), "".join(f"{part}: " for part in parts), own

    def dose_response(self) -> tuple[str, str]:
        parts = []
        for end, about, rows in self.groups("dose_response"):
            n, positive = (
                next(r[k] for r in rows if r["level"] == PRIMARY_LEVEL) for k in ("n", "n_positive")
            )
            caption = (
                f"{about}AUC, sensitivity and specificity against dose, per scan ({positive} of {n} with the "
                "finding) and per slice. Bands: 95 % intervals over patients; thin marks: SD over training "
                "seeds; dashed grey: the AUC of the position alone, which knows no image. Doses of arms "
                "stand side by side to be told apart."
            )
            parts.append(
                self.page.figure(f"dose_response{end}", figures.dose_response(rows, self.arms), caption)
            )
        return section("Dose and response", *parts)

    def dose_tables(self) -> tuple[str, str]:
        parts = [self._response_table()]
        for end, about, rows in self.groups("strata"):
            caption = (
                f"{about}Sensitivity per scan by subtype and size of the lesion (n scans with it; several "
                "may be in one scan), with 95 % intervals over patients."
            )
            parts.append(self.page.figure(f"strata{end}", figures.strata(rows, self.arms), caption))
        return section("Every dose in numbers", *parts)

    def _response_table(self) -> str:
        columns = self._about(self.found["dose_response"]) | {
            "arm": lambda row: row["arm"],
            "per": lambda row: row["level"],
            "dose": dose_of,
            "n": lambda row: row["n"],
            **{words: lambda row, kind=kind: with_interval(row, kind) for kind, words in NAMES.items()},
            "position": lambda row: shown(row["auc_null"], 2),
        }
        caption = (
            "AUC, sensitivity and specificity with 95 % intervals over patients ± SD over training seeds; "
            "position: AUC of the slice's height alone. tables/dose_response.csv"
        )
        rows = sorted(self.found["dose_response"], key=lambda row: LEVELS[::-1].index(row["level"]))
        return self.page.table(caption, columns, rows)

    @staticmethod
    def _about(rows: Sequence[dict]) -> dict[str, Callable[[dict], str]]:
        """Columns of task and dose model, where there are several."""
        words = {"task": "task", "dose_model": "dose model"}
        return {
            name: lambda row, key=key: row[key]
            for key, name in words.items()
            if len({row.get(key) for row in rows}) > 1
        }

    def non_inferiority(self) -> tuple[str, str]:
        parts = []
        for end, about, rows in self.groups("against_reference", level=PRIMARY_LEVEL):
            caption = (
                f"{about}Difference to arm {rows[0]['reference']} at "
                f"{dose_words(rows[0]['dose_model'], rows[0]['reference_dose'])} per scan, with 95 % "
                "intervals over patients. Dashed: the margin stated beforehand. Filled marks are "
                "non-inferior, crosses inferior, open marks inconclusive."
            )
            drawn = figures.non_inferiority(rows, self.arms)
            parts.append(self.page.figure(f"non_inferiority{end}", drawn, caption))
        return section("Non-inferiority", *parts, self._verdicts(), self._strata_verdicts(), self._between())

    def _verdicts(self) -> str:
        rows = [row for row in self.found["verdicts"] if row["stratum"] == "all"]
        rows.sort(key=lambda row: LEVELS[::-1].index(row["level"]))
        columns = self._about(rows) | {
            "arm": lambda row: row["arm"],
            "per": lambda row: row["level"],
            "number": lambda row: NAMES[row["kind"]],
            "margin": lambda row: f"{row['margin']:g}",
            "non-inferior down to": dose_of,
            "stopped at": lambda row: dose_words(row["dose_model"], row["failed_dose"]),
            "shown there": lambda row: row["how"] or "",
            "difference there": lambda row: (
                f"{shown(row['failed_estimate'])} ({range_of(row, 'failed', 3)})" if row["how"] else ""
            ),
            "power": lambda row: shown(row["power"], 2) if row["how"] else "",
            "patients": lambda row: row["patients"] if row["how"] else "",
            "for 80 %": lambda row: shown(row["patients_needed"], 0) if row["how"] else "",
        }
        caption = (
            "The lowest dose shown to be non-inferior to the reference, doses being tested from the "
            "highest down until one fails. Power: how likely as many patients show non-inferiority if "
            "there is no true difference; the last column says how many it would take for 80 %. "
            "tables/verdicts.csv"
        )
        return self.page.table(caption, columns, rows)

    def _strata_verdicts(self) -> str:
        rows = [row for row in self.found["verdicts"] if row["stratum"] != "all"]
        arms = list(dict.fromkeys(row["arm"] for row in rows))
        cells: dict[tuple, dict] = {}
        for row in rows:
            key = tuple(row[name] for name in ("task", "dose_model", "stratum", "kind"))
            about = {"task": row["task"], "dose_model": row["dose_model"]}
            own = cells.setdefault(key, about | {"stratum": row["stratum"], "kind": row["kind"], "arms": {}})
            own["arms"][row["arm"]] = row

        def verdict(row: dict, arm: str) -> str:
            own = row["arms"].get(arm)
            if own is None:
                return ""
            stop = (
                f"; {own['how']} at {dose_words(own['dose_model'], own['failed_dose'])}" if own["how"] else ""
            )
            return f"{dose_of(own)}{stop}"

        columns = self._about(list(cells.values())) | {
            "lesion": lambda row: stratum_words(row["stratum"]),
            "number": lambda row: NAMES[row["kind"]],
            **{f"arm {arm}": lambda row, arm=arm: verdict(row, arm) for arm in arms},
        }
        caption = (
            "The same per scan by subtype and size of the lesion, against all scans without the finding. Not "
            "corrected for the number of strata. tables/verdicts.csv"
        )
        return self.page.table(caption, columns, list(cells.values()))

    def _between(self) -> str:
        rows = [row for row in self.found["between_arms"] if row["level"] == PRIMARY_LEVEL]
        columns = self._about(rows) | {
            "arm": lambda row: row["arm"],
            "against": lambda row: row["against"],
            "dose": dose_of,
            "number": lambda row: NAMES[row["kind"]],
            "difference": lambda row: (
                f"{signed(row['estimate'], 3)} ({shown(row['low'])} to {shown(row['high'])})"
            ),
            "SD over seeds": lambda row: shown(row["seed_sd"]),
            "p": lambda row: p_value(row["p"]),
            "p (Holm)": lambda row: p_value(row["p_holm"]),
        }
        caption = (
            "Does denoising, or training on it, help? Difference per scan between arms at the same dose, on "
            "the same patients with the same noise. tables/between_arms.csv"
        )
        return self.page.table(caption, columns, rows)

    def image_quality(self) -> tuple[str, str]:
        parts = []
        for end, about, rows in self.groups("image_quality"):
            reference = "noise-free truth" if self.study.pack.truth is not None else "image at its own dose"
            few = next((row["n_patients"] for row in rows if row["of_subset"]), None)
            subset = (
                ""
                if few is None
                else f" Dotted: a subset of {few} patients, the noisy input of it beside it."
            )
            caption = (
                f"{about}Image quality against dose, inside the {self.study.design.mask} and against the "
                f"{reference}, with 95 % intervals over patients where there are any. Contrast kept, "
                f"sharpness: 1 is as in the reference. d': channelised Hotelling observer.{subset}"
            )
            drawn = figures.image_quality(rows, self.images, figures.QUALITY)
            parts.append(self.page.figure(f"image_quality{end}", drawn, caption))
            caption = f"{about}Error and bias of each tissue, with 95 % intervals over patients.{subset}"
            drawn = figures.image_quality(rows, self.images, figures.TISSUES)
            parts.append(self.page.figure(f"image_tissues{end}", drawn, caption))
        for end, about, rows in self.groups("noise_spectra"):
            caption = f"{about}Noise power by frequency: the height is the strength, the shape the grain."
            drawn = figures.noise_spectra(rows, self.images)
            parts.append(self.page.figure(f"noise_spectra{end}", drawn, caption))
        return section("Image quality", *parts, self._image_tables())

    def _image_tables(self) -> str:
        rows = self.found["image_quality"]
        if not rows:
            return ""
        seeds = {row["noise_seed"] for row in rows}
        about = {key: make for key, make in self._about(rows).items() if key != "task"} | {
            "images": figures.image_words,
            "dose": dose_of,
            **({"noise seed": lambda row: row["noise_seed"]} if len(seeds) > 1 else {}),
        }
        low, high = metrics.RANGE_HU
        errors = {"MSE": "mse", "RMSE": "rmse_hu", "PSNR": "psnr", "SSIM": "ssim"}
        for kind, word in (("rmse", "RMSE"), ("bias", "bias")):
            names = figures.TISSUE_WORDS.items()
            errors |= {f"{word} {words}": f"{kind}_{tissue}_hu" for tissue, words in names}
        use = {"noise SD": "noise_sd_ratio", "texture": "spectrum_distance"}
        use |= {"edges brain": "edge_sharpness_brain", "edges skull": "edge_sharpness_skull"}
        for kind, signal in (("blood", "bleed"), ("infarct", "infarct")):
            use |= {f"contrast {kind}": f"contrast_kept_{kind}", f"CNR {kind}": f"cnr_{kind}"}
            use |= {f"d' {signal}": f"d_prime_{signal}"}
        captions = (
            (
                errors,
                f"Error of the image, in HU (MSE in HU²); PSNR and SSIM over {low:g} to {high:g} HU. "
                "Noisy input is the low dose as it is. tables/image_quality.csv has the intervals",
            ),
            (
                use,
                "What is left of what is read: noise SD against that of the highest dose, change of the "
                "noise's texture (0 none, 1 all), gradient of edges and contrast of lesions left (1 all), "
                "contrast to noise, detectability d' of a faint bleed and infarct. tables/image_quality.csv",
            ),
        )

        def columns(names: dict[str, str]) -> dict[str, Callable[[dict], str]]:
            return {words: lambda row, name=name: rounded(row[name]) for words, name in names.items()}

        return "".join(self.page.table(caption, about | columns(names), rows) for names, caption in captions)

    def probabilities(self) -> tuple[str, str]:
        parts = []
        for end, about, rows in self.groups("dose_response"):
            for level in LEVELS[::-1]:
                answers = self._answers(rows[0]["task"], rows[0]["dose_model"], level)
                caption = f"{about}ROC curves per {level}, one of each network and noise. Dashed: chance."
                parts.append(self.page.figure(f"roc_{level}{end}", figures.roc(answers, self.arms), caption))
            caption = (
                f"{about}Reliability per slice, networks and noises together, in {figures.RELIABILITY_BINS} "
                "bins. On the dashed line a probability is as often right as it says."
            )
            drawn = figures.reliability_diagram(answers, self.arms)
            parts.append(self.page.figure(f"reliability{end}", drawn, caption))
        for end, about, rows in self.groups("calibration", level=PRIMARY_LEVEL):
            caption = (
                f"{about}Calibration per scan, how far the best threshold lies from the stored one, and "
                "predictive values at the stated prevalence, with 95 % intervals over patients."
            )
            parts.append(self.page.figure(f"calibration{end}", figures.calibration(rows, self.arms), caption))
        return section("Probabilities and decisions", *parts, self._calibration_table())

    def _answers(self, task: str, model: str, level: str) -> list[Answers]:
        result = []
        for family in self.study.families:
            if family.task != task:
                continue
            for dose, one in self.study.ladder(family, model):
                targets, scores, _ = self.study.family_reading(family, one.conditions, level).known
                panel = f"dose {dose_words(model, dose)}"
                result.append(Answers(panel, self.study.labels[family], targets, scores))
        order = [f"dose {dose_words(model, dose)}" for dose in self.study.design.ladders[model]]
        return sorted(result, key=lambda one: order.index(one.panel))

    def _calibration_table(self) -> str:
        rows = [row for row in self.found["calibration"] if row["level"] == PRIMARY_LEVEL]
        if not rows:
            return ""

        def pair(name: str, digits: int = 2) -> Callable[[dict], str]:
            return lambda row: (
                f"{shown(row[f'{name}_stored'], digits)} → {shown(row[f'{name}_tuned'], digits)}"
            )

        columns = self._about(rows) | {
            "arm": lambda row: row["arm"],
            "dose": dose_of,
            "ECE": lambda row: shown(row["ece"]),
            "Brier": lambda row: shown(row["brier"]),
            "threshold": pair("threshold", 3),
            "sensitivity": pair("sens"),
            "specificity": pair("spec"),
            "PPV": lambda row: with_interval(row, "ppv", 2),
            "NPV": lambda row: with_interval(row, "npv", 2),
        }
        caption = (
            "Calibration and decisions per scan. Arrows: from the stored threshold, chosen on validation, "
            "to the one that would suit these scans best, which flatters and only says how far it has "
            f"drifted. PPV and NPV of the stored threshold at a prevalence of {rows[0]['prevalence']:g}. "
            "tables/calibration.csv"
        )
        return self.page.table(caption, columns, rows)

    def segmentation(self) -> tuple[str, str]:
        parts = []
        for end, about, rows in self.groups("segmentation"):
            caption = (
                f"{about}Segmenters against dose, with and without denoising: Dice of scans with a lesion, "
                "share of lesions touched, and volume found in scans without any; 95 % intervals over "
                "patients."
            )
            parts.append(
                self.page.figure(f"segmentation{end}", figures.segmentation(rows, self.images), caption)
            )
            volumes = self._volumes(rows)
            caption = (
                f"{about}Bland-Altman plots of the lesion volume of scans with a lesion, at the highest and "
                "the lowest dose: bias (line) and 95 % limits of agreement (dashed)."
            )
            parts.append(
                self.page.figure(f"bland_altman{end}", figures.bland_altman(volumes, self.images), caption)
            )
        columns = self._about(self.found["segmentation"]) | {
            "segmenter": lambda row: row["segmenter"],
            "denoiser": lambda row: row["denoiser"],
            "dose": dose_of,
            "scans": lambda row: row["n_cases"],
            "Dice": lambda row: with_interval(row, "dice", 2),
            "gain by denoising": lambda row: with_interval(row, "dice_gain", 2),
            "lesions found": lambda row: with_interval(row, "any_recall", 2),
            "precision": lambda row: with_interval(row, "any_precision", 2),
            "false volume, ml": lambda row: shown(row["false_positive_ml"], 2),
            "bias, ml": lambda row: shown(row["volume_error_ml"], 1),
            "limits, ml": lambda row: (
                f"{shown(row['limit_lower_ml'], 1)} to {shown(row['limit_upper_ml'], 1)}"
            ),
        }
        caption = "Lesions outlined, with 95 % intervals over patients. tables/segmentation.csv"
        parts.append(self.page.table(caption, columns, self.found["segmentation"]))
        both = self.found.get("two_stage", [])
        columns = self._about(both) | {
            "arm": lambda row: row["arm"],
            "segmenter": lambda row: row["segmenter"],
            "dose": dose_of,
            "called": lambda row: shown(row["called"], 2),
            "Dice": lambda row: with_interval(row, "dice", 2),
            "normal scans clean": lambda row: with_interval(row, "clean", 2),
            "false volume, ml": lambda row: shown(row["false_positive_ml"], 2),
        }
        caption = (
            "Two stages: scans that the arm's classifiers call normal are not outlined, whose lesions count "
            "as missed. tables/two_stage.csv"
        )
        return section("Segmentation", *parts, self.page.table(caption, columns, both))

    def _volumes(self, rows: Sequence[dict]) -> list[Volumes]:
        """Of the highest and the lowest dose."""
        doses = sorted({row["dose"] for row in rows})
        result = []
        for one in self.study.outlines:
            denoiser = "none" if one.denoiser is None else one.denoiser.path.name
            for row in rows:
                if (row["segmenter"], row["denoiser"]) != (one.segmenter.path.name, denoiser):
                    continue
                if row["dose"] not in (doses[0], doses[-1]):
                    continue
                condition = self.study.at(row["dose_model"], row["dose"])[0]
                few = self.study.subset(one.denoiser)
                cell = Cell(condition, one.denoiser, "segmenter", one.segmenter, few)
                reports = [own for own in self.study.cells.load(cell)["reports"] if own["truth_ml"] > 0]
                truth, predicted = (
                    np.array([own[f"{n}_ml"] for own in reports]) for n in ("truth", "predicted")
                )
                words = "noisy input" if denoiser == "none" else denoiser.removesuffix(".pt")
                panel = f"{one.segmenter.path.stem}, {words}, {dose_of(row)}"
                agreement = (row["volume_error_ml"], row["limit_lower_ml"], row["limit_upper_ml"])
                result.append(Volumes(panel, denoiser, truth, predicted, *agreement))
        return result

    def stress(self) -> tuple[str, str]:
        parts = []
        for end, about, rows in self.groups("stress", level=PRIMARY_LEVEL):
            caption = (
                f"{about}Stress test at {dose_of(rows[0])}: what an artifact of growing severity changes per "
                "scan, against the same scans without it, with 95 % intervals over patients."
            )
            parts.append(self.page.figure(f"stress{end}", figures.stress(rows, self.arms), caption))
        rows = [row for row in self.found.get("stress", []) if row["level"] == PRIMARY_LEVEL]
        worst = max((row["severity"] for row in rows), default=math.nan)
        columns = self._about(rows) | {
            "arm": lambda row: row["arm"],
            "artifact": lambda row: row["artifact"],
            "number": lambda row: NAMES[row["kind"]],
            "without": lambda row: shown(row["b"]),
            "with": lambda row: shown(row["a"]),
            "change": lambda row: (
                f"{signed(row['estimate'], 3)} ({shown(row['low'])} to {shown(row['high'])})"
            ),
        }
        caption = (
            f"Robustness at the largest severity tried ({worst:.3g}), per scan. tables/stress.csv has all"
        )
        table = self.page.table(caption, columns, [row for row in rows if row["severity"] == worst])
        return section("Stress test", *parts, table)

    def external(self) -> tuple[str, str]:
        rows = self.found.get("external", [])
        if not rows:
            return "", ""
        names = dict.fromkeys(row["data"] for row in rows)
        # the folder's name alone where that tells them apart
        short = {name: Path(name).name for name in names}
        names = short if len(set(short.values())) == len(names) else {name: name for name in names}
        parts = []
        tasks = dict.fromkeys(row["task"] for row in rows)
        for task in tasks:
            own = [row for row in rows if row["task"] == task]
            caption = (
                f"{task}: AUC per scan at the highest dose on every set, and what is lost to the set whose "
                "training split the network comes from (home)."
            )
            end = f"_{task}" if len(tasks) > 1 else ""
            parts.append(self.page.figure(f"external{end}", figures.external(own, names), caption))
        columns = {
            **({"task": lambda row: row["task"]} if len(tasks) > 1 else {}),
            "arm": lambda row: row["pipeline"],
            "classifier": lambda row: row["classifier"],
            "denoiser": lambda row: row["denoiser"] or "none",
            "data": lambda row: names[row["data"]],
            "home": lambda row: names.get(row["home"], "not among them"),
            "scans": lambda row: row["n_scans"],
            "AUC": lambda row: with_interval(row, "auc"),
            "drop": lambda row: with_interval(row, "drop"),
        }
        caption = "Each classifier on each set, with 95 % intervals (DeLong). tables/external.csv"
        return section("Other test sets", *parts, self.page.table(caption, columns, rows))

    def seeds(self) -> tuple[str, str]:
        networks = [
            row | {"arm": self._label(row)} for row in self.found["seeds"] if row["level"] == PRIMARY_LEVEL
        ]
        parts = []
        for end, about, rows in self.groups("dose_response", level=PRIMARY_LEVEL):
            if all(math.isnan(known(row["auc_seed_sd"])) for row in rows):
                continue
            caption = f"{about}Mean and SD over training seeds and noises, per scan."
            parts.append(self.page.figure(f"seed_bars{end}", figures.seed_bars(rows, self.arms), caption))
            task, model = rows[0]["task"], rows[0]["dose_model"]
            own = [row for row in networks if (row["task"], row["dose_model"]) == (task, model)]
            caption = (
                f"{about}The single networks, per scan: median, quartiles and range, each network a mark."
            )
            parts.append(self.page.figure(f"seed_boxes{end}", figures.seed_boxes(own, self.arms), caption))
        columns = self._about(networks) | {
            "arm": lambda row: row["arm"],
            "classifier": lambda row: row["classifier"],
            "training seed": lambda row: row["seed"],
            "noise seed": lambda row: row["noise_seed"],
            "dose": dose_of,
            **{words: lambda row, name=name: shown(row[name]) for name, words in figures.SCORES.items()},
        }
        more = f"; the first {LISTED} of {len(networks)}" if len(networks) > LISTED else ""
        caption = f"Every network per scan{more}. tables/seeds.csv has all, per slice too"
        return section("Training seeds", *parts, self.page.table(caption, columns, networks[:LISTED]))

    def _label(self, row: dict) -> str:
        before = None if row["denoiser"] is None else family_name(Path(row["denoiser"]))
        family = Family(row["task"], row["arm"], before, family_name(Path(row["classifier"])))
        return self.study.labels[family]

    # ------------------------------------------------------------ scans that flip

    def flips(self) -> tuple[str, str]:
        rows = sorted(
            self.found["flips"],
            key=lambda row: (row["change"] != "lost", -abs(row["score"] - row["score_reference"])),
        )
        chosen = {}
        for row in rows:  # of a patient and arm the largest change
            chosen.setdefault((row["patient"], row["arm"], row["task"]), row)
        parts = [
            self.page.figure(
                f"failure_{number}", figures.failure(gallery.failure_tiles(self.study, row)), self._told(row)
            )
            for number, row in enumerate(list(chosen.values())[:FAILURES], start=1)
        ]
        legend = (
            "Brain window, the patient's right at the left. Green: the true lesion. Red: what a segmenter "
            f"outlines. Heat: Grad-CAM of the arm's first network, from 0 to {FULL_HEAT:g} nats in all "
            "pictures. The slice with most lesion, or the most suspicious one."
        )
        columns = self._about(rows) | {
            "arm": lambda row: row["arm"],
            "dose": dose_of,
            "change": lambda row: row["change"],
            "patient": lambda row: row["patient"],
            "finding": lambda row: gallery.finding(self.study.pack.series[row["row"]]["labels"]),
            "at the highest dose": lambda row: shown(row["score_reference"]),
            "here": lambda row: shown(row["score"]),
            "p (McNemar)": lambda row: p_value(row["mcnemar_p"]),
        }
        more = f"; the first {LISTED} of {len(rows)}" if len(rows) > LISTED else ""
        caption = (
            "Scans called right at the highest dose and wrong at a lower one (lost), or the other way round "
            f"(gained), largest change first{more}. Scores: means over networks. tables/flips.csv"
        )
        table = self.page.table(caption, columns, rows[:LISTED])
        return section("Scans that flip", paragraph(legend, "note") if parts else "", *parts, table)

    def _told(self, row: dict) -> str:
        model = row["dose_model"]
        reference = dose_words(model, self.study.design.reference(model))
        change = "right, then wrong" if row["change"] == "lost" else "wrong, then right"
        return (
            f"Patient {row['patient']}, {gallery.finding(self.study.pack.series[row['row']]['labels'])}; arm "
            f"{row['arm']}: {change}. Score {shown(row['score_reference'])} at {reference}, "
            f"{shown(row['score'])} at {dose_of(row)}."
        )


def _methods(page: Page, study: Study, manifest: dict) -> tuple[str, str]:
    texts = methods.paragraphs(study, manifest).items()
    parts = [f"<p><b>{escape(name)}.</b> {escape(text)}</p>\n" for name, text in texts if text]
    hashes = (f"{name} {digest}" for name, digest in manifest["checkpoints"].items())
    for name, text in (("Command", manifest["command"]), ("SHA-256 of the networks", ", ".join(hashes))):
        parts.append(f"<p><b>{name}.</b> <code>{escape(text)}</code></p>\n" if text else "")
    arms = [
        {"arm": label, "pipeline": LEGEND[family.name], "task": family.task, "family": family}
        for family, label in study.labels.items()
    ]
    columns = {
        "arm": lambda row: row["arm"],
        "what it is": lambda row: row["pipeline"].replace("->", "→"),
        "task": lambda row: row["task"],
        "denoiser": lambda row: row["family"].denoiser or "none",
        "classifier": lambda row: row["family"].classifier,
        "training seeds": lambda row: methods.listed(study.seeds(row["family"])),
    }
    parts.append(page.table("The arms.", columns, arms))
    columns = {
        "network": lambda one: one.path.name,
        "kind": lambda one: f"{one.facts['stage']}, {one.facts['model']['name']}",
        "parameters": lambda one: one.facts.get("parameters", "n/a"),
        "trained on": lambda one: f"{len(one.facts['trained_on'])} patients",
        "at doses": lambda one: methods.listed(one.facts["doses"]) or "clean slices",
        "seed": lambda one: one.facts["seed"],
        "epoch chosen": lambda one: one.facts.get("validation", {}).get("epoch", "n/a"),
    }
    parts.append(
        page.table("The networks; all settings are in their model cards.", columns, study.networks.trained)
    )
    return section("Methods", *parts)


def _checklist(page: Page, study: Study, manifest: dict, found: dict[str, list[dict]]) -> tuple[str, str]:
    columns = {
        "what is asked": lambda item: item[0],
        "by": lambda item: item[1],
        "this study": lambda item: item[2] or methods.BLANK,
    }
    caption = (
        "After CLAIM 2024, STARD-AI and TRIPOD+AI, in substance and in our words: a help in writing, not the "
        "guidelines themselves, which have more items and exact wording."
    )
    items = methods.checklist(study, manifest, found)
    return section("Checklist for a paper", page.table(caption, columns, items))


# ---------------------------------------------------------------- the whole


def write(out: Path, study: Study, manifest: dict, found: dict[str, list[dict]]) -> list[Path]:
    """Write <out>/report.html and <out>/figures/*.png and *.svg. Returns the page and the folder of figures.

    manifest: of run_experiments.py. found: table -> rows, as tables.all_tables has them, and "external" where
    there are several sets. Figures of an earlier run that are not drawn any more are removed."""
    folder = Path(out) / "figures"
    page = Page(folder)
    parts = Report(page, study, manifest, found)
    sections = [
        parts.dose_response(),
        parts.non_inferiority(),
        parts.dose_tables(),
        parts.image_quality(),
        parts.probabilities(),
        parts.segmentation(),
        parts.stress(),
        parts.external(),
        parts.seeds(),
        parts.flips(),
        _methods(page, study, manifest),
        _checklist(page, study, manifest, found),
    ]
    sections = [(title, content) for title, content in sections if content]
    names = [re.sub(r"\W+", "-", title.lower()) for title, _ in sections]
    links = "".join(
        f'<a href="#{name}">{escape(title)}</a>\n' for name, (title, _) in zip(names, sections, strict=True)
    )
    body = "".join(
        f'<section id="{name}"><h2>{escape(title)}</h2>\n{content}</section>\n'
        for name, (title, content) in zip(names, sections, strict=True)
    )
    title = "How far can the dose be cut?"
    about = f"Test split of {manifest['data']}: {methods.counts(manifest)}"
    answers = "".join(map(paragraph, answer(study, found)))
    warnings = paragraph(methods.NOTICE, "note") + (
        paragraph(methods.PHANTOM, "note") if "phantom" in methods.sources(study) else ""
    )
    legend = "".join(
        paragraph(f"Arm {label}: {LEGEND[family.name].replace('->', '→')}.", "note")
        for family, label in study.labels.items()
    )
    style = STYLE_SHEET.read_text(encoding="utf-8")
    with stage.atomic_write(Path(out) / "report.html") as file:
        file.write(
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>\n{style}</style></head>\n<body>\n<h1>{title}</h1>\n"
            f'{paragraph(about, "about")}<div class="answer">{answers}</div>\n{legend}{warnings}'
            f"<nav>{links}</nav>\n{body}</body></html>\n"
        )
    for path in folder.glob("*.*"):
        if path.suffix in (".png", ".svg") and path.stem not in page.drawn and path.stem.startswith(FIGURES):
            path.unlink()
    return [Path(out) / "report.html", folder]
