"""Name the expression of every mouth in photos, with the weights that train.py made.

    python predict.py photo.jpg                        one line a face
    python predict.py holiday/ --save named            annotated copies of all photos of a folder
    python predict.py crops/ --crops --json            mouth crops instead of photos, one JSON object a line
    python predict.py --evaluate data/val --crops      accuracy on a folder of class folders

In other code:

    from net import load_model
    from predict import predict_photos
    for result in predict_photos(["photo.jpg"], load_model("models/model.pt")):
        print(result.faces, result.probabilities)
"""

import argparse
import io
import json
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from net import load_model, predict
from preprocess_lips import Face, LipCropper, cores, label_font, read_photo, write_file

BATCH = 32  # photos whose faces go through the network together
MIN_SAVED = 360  # pixels; smaller photos are enlarged before they are annotated


class Result(NamedTuple):
    """What became of one photo."""

    source: Path
    faces: list  # of preprocess_lips.Face, largest first
    probabilities: np.ndarray  # float32, faces x classes, rows sum to 1
    error: str  # empty, or why there is no face


def predict_photos(sources, model, crops=False, workers=None):
    """Find and classify the mouths in photos.

    Parameters
    ----------
    sources : sequence of path-like
    model : net.simpleconv3
        In eval mode, as `net.load_model` returns it.
    crops : bool
        The images are mouth crops: each is classified whole.
    workers : int, optional
        Threads that decode and find faces while the network runs. Default: one a core.

    Yields
    ------
    Result
        One for each source, in their order.
    """
    sources = [Path(source) for source in sources]
    workers = min(workers or cores(), len(sources)) or 1
    cropper = None if crops else LipCropper()

    def find(source):
        try:
            if crops:
                crop = read_photo(source)
                box = (0, 0, crop.shape[1], crop.shape[0])
                faces = [Face(box, None, box, crop, "")]
            else:
                faces, _, _ = cropper.find(source)
        except OSError as error:
            return Result(source, [], None, f"unreadable: {error.strerror or error}")
        return Result(source, faces, None, "" if faces else "no face found")

    with ThreadPoolExecutor(workers) as pool:
        waiting, ahead = deque(), deque(sources)
        while ahead or waiting:
            while ahead and len(waiting) < BATCH + 2 * workers:
                waiting.append(pool.submit(find, ahead.popleft()))
            results = [waiting.popleft().result() for _ in range(min(BATCH, len(waiting)))]
            probabilities = predict(model, [face.crop for result in results for face in result.faces]).numpy()
            for result in results:
                n = len(result.faces)
                yield result._replace(probabilities=probabilities[:n])
                probabilities = probabilities[n:]


def as_json(result, classes):
    """The objects that --json prints for a photo: one a face, or one that says why there is none."""
    if result.error:
        return [{"source": str(result.source), "face": None, "error": result.error}]
    return [
        {
            "source": str(result.source), "face": i, "box": list(face.box), "mouth": list(face.mouth),
            "label": classes[row.argmax()], "probability": round(float(row.max()), 4),
            "probabilities": {name: round(float(p), 4) for name, p in zip(classes, row)},
        }
        for i, (face, row) in enumerate(zip(result.faces, result.probabilities), 1)
    ]


def annotate(photo, faces, probabilities, classes):
    """A copy of the photo with every mouth's box, expression and probability.

    Parameters
    ----------
    photo : uint8 array of shape (H, W, 3), RGB
    faces, probabilities
        As in a `Result`.
    classes : sequence of str

    Returns
    -------
    PIL.Image.Image
        Small photos are enlarged, so that the words can be read.
    """
    scale = max(1.0, MIN_SAVED / max(photo.shape[:2]))
    photo = Image.fromarray(photo)
    photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(photo)
    side = min(photo.size)
    line, size = max(2, side // 200), max(15, side // 26)
    for face, row in zip(faces, probabilities):
        left, top, right, bottom = (v * scale for v in face.mouth)
        box = (max(left, 0), max(top, 0), min(right, photo.width - 1), min(bottom, photo.height - 1))
        draw.rectangle((box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1), outline="black", width=line + 2)
        draw.rectangle(box, outline="yellow", width=line)
        font, name = label_font(classes[row.argmax()], size)
        text = f"{name} {row.max():.0%}"
        width, height = draw.textbbox((0, 0), text, font)[2:]
        x = min(max(box[0], 0), max(0, photo.width - width - 8))
        y = box[1] - height - 8 if box[1] > height + 8 else min(box[3], photo.height - height - 8)
        draw.rectangle((x, y, x + width + 8, y + height + 7), "yellow")
        draw.text((x + 4, y + 3), text, "black", font)
    return photo


def list_inputs(inputs):
    """Pairs of (photo, its path below its input); folders are searched at any depth for image files."""
    found, suffixes = [], Image.registered_extensions()
    for path in inputs:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
            if not files:
                raise FileNotFoundError(f"{path}: no photos in this folder")
            found += [(file, file.relative_to(path)) for file in files]
        else:
            found.append((path, Path(path.name)))
    return found


def evaluate(pairs, classes):
    """Scores of predictions.

    Parameters
    ----------
    pairs : sequence of (int, int)
        True and predicted class of every image.
    classes : sequence of str

    Returns
    -------
    dict
        ``images``, ``accuracy``, ``balanced_accuracy`` (mean of the recalls of the classes that occur),
        ``classes`` (name to precision, recall, f1, images) and ``confusion`` (rows true, columns predicted).
        What has no denominator is None.
    """
    matrix = np.zeros((len(classes), len(classes)), int)
    for truth, guess in pairs:
        matrix[truth, guess] += 1

    def ratio(a, b):
        return round(float(a / b), 4) if b else None

    hits, true, guessed = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    recalls = [h / t for h, t in zip(hits, true) if t]
    return {
        "images": int(matrix.sum()),
        "accuracy": ratio(hits.sum(), matrix.sum()),
        "balanced_accuracy": ratio(sum(recalls), len(recalls)),
        "classes": {
            name: {"precision": ratio(h, g), "recall": ratio(h, t), "f1": ratio(2 * h, t + g), "images": int(t)}
            for name, h, t, g in zip(classes, hits, true, guessed)
        },
        "confusion": matrix.tolist(),
    }


def evaluation_table(scores):
    """Lines of text for what `evaluate` returns."""
    def percent(value):
        return "-" if value is None else f"{value:.1%}"

    names = list(scores["classes"])
    width = max(map(len, ("true \\ predicted", *names))) + 2
    lines = ["class".ljust(width) + "   images precision    recall        f1"]
    for name, row in scores["classes"].items():
        lines.append(name.ljust(width) + f"{row['images']:9}" + "".join(f"{percent(row[k]):>10}" for k in ("precision", "recall", "f1")))
    lines += ["", "true \\ predicted".ljust(width) + "".join(f"{name[:12]:>14}" for name in names)]
    for name, row in zip(names, scores["confusion"]):
        lines.append(name.ljust(width) + "".join(f"{n:14}" for n in row))
    lines += ["", f"accuracy {percent(scores['accuracy'])}, balanced accuracy {percent(scores['balanced_accuracy'])}"
                  f" on {scores['images']} images" + (f"; {scores['skipped']} without a face or unreadable" if scores["skipped"] else "")]
    if scores["contradicted"]:
        lines += ["", "most confidently contradicted (wrong labels are among them; --save DIR shows all):"]
        lines += [f"  {one['source']}  {one['label']} {one['probability']:.1%}" for one in scores["contradicted"][:8]]
    return lines


def run_evaluation(folder, model, crops):
    """Score a model on a folder of class folders.

    Returns
    -------
    scores : dict
        As `evaluate` returns it, with ``skipped``, the number of photos without a face, and ``contradicted``,
        the photos whose folder the model contradicts, most confident first: wrong labels are among them.
    against : list of (float, Result, str, str)
        The same, as probability, result, folder and label.
    """
    files = list_inputs([folder])
    unknown = sorted({path.parts[0] for _, path in files} - set(model.classes))
    if unknown:
        raise ValueError(f"{folder}: holds {unknown[0]}, which is none of the model's classes ({', '.join(model.classes)})")
    pairs, skipped, against = [], 0, []
    results = predict_photos([file for file, _ in files], model, crops)
    for (_, path), result in zip(files, tqdm(results, total=len(files), unit="photo", leave=False, disable=None)):
        if result.error:
            skipped += 1
        else:
            row = result.probabilities[0]
            truth, guess = model.classes.index(path.parts[0]), int(row.argmax())
            pairs.append((truth, guess))
            if truth != guess:
                against.append((float(row[guess]), result, model.classes[truth], model.classes[guess]))
    against.sort(key=lambda one: -one[0])
    scores = evaluate(pairs, model.classes) | {"skipped": skipped, "contradicted": [
        {"source": str(result.source), "folder": truth, "label": guess, "probability": round(p, 4)} for p, result, truth, guess in against]}
    return scores, against


def contradictions_sheet(against, side=150, columns=6, most=48):
    """Mouths that the model contradicts, most confident first, with folder, label and probability: PIL image."""
    against = against[:most]
    rows = -(-len(against) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + 40)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (p, result, truth, guess) in enumerate(against):
        x, y = i % columns * side, i // columns * (side + 40)
        sheet.paste(Image.fromarray(result.faces[0].crop).resize((side - 4, side - 4)), (x + 2, y + 2))
        for line, text in enumerate((f"in {truth}", f"not {guess} {p:.0%}?")):
            font, text = label_font(text, 13)
            draw.text((x + 4, y + side + 18 * line), text, "black" if line == 0 else "firebrick", font)
    return sheet


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", type=Path, metavar="INPUT", help="photos or folders of photos")
    parser.add_argument("--model", type=Path, default=Path("models/model.pt"), help="(default: %(default)s)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write annotated copies of the photos there, or with --evaluate\n"
                        "a picture of the mouths that the model contradicts")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of words")
    parser.add_argument("--crops", action="store_true", help="the images are mouth crops, not photos")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="score the model on a folder of class folders")
    args = parser.parse_args(argv)
    if not args.inputs and not args.evaluate:
        parser.error("name photos or a folder, or --evaluate DIR")
    try:
        model = load_model(args.model)
        if args.evaluate:
            if not args.evaluate.is_dir():
                raise FileNotFoundError(f"{args.evaluate}: no such folder")
            scores, against = run_evaluation(args.evaluate, model, args.crops)
            print(json.dumps(scores, ensure_ascii=False) if args.json else "\n".join(evaluation_table(scores)))
            if args.save and against:
                sheet = args.save / "contradictions.jpg"
                save_jpeg(contradictions_sheet(against), sheet)
                print(f"the mouths that the model contradicts: {sheet}", file=sys.stderr if args.json else sys.stdout)
        if args.inputs:
            predict_and_print(args, model)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def save_jpeg(picture, path):
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=92)
    write_file(path, jpeg.getvalue())


def predict_and_print(args, model):
    files = list_inputs(args.inputs)
    photos = faces = 0
    used = set()
    results = predict_photos([file for file, _ in files], model, args.crops)
    with tqdm(total=len(files), unit="photo", leave=False, disable=None if len(files) > 1 else True) as bar:
        for (_, relative), result in zip(files, results):
            with bar.external_write_mode(sys.stdout):
                for line in as_json(result, model.classes):
                    if args.json:
                        print(json.dumps(line, ensure_ascii=False), flush=True)
                    elif "error" in line:
                        print(f"{line['source']}  {line['error']}")
                    else:
                        print(f"{line['source']}  face {line['face']}  {line['label']}  {line['probability']:.1%}")
            photos += not result.error
            faces += len(result.faces)
            if args.save and not result.error.startswith("unreadable"):
                target = args.save / relative.with_suffix(".jpg")
                n = 2
                while target in used:  # a.png beside a.jpg, or the same name from two folders
                    target = args.save / relative.with_name(f"{relative.stem}_{n}.jpg")
                    n += 1
                used.add(target)
                save_jpeg(annotate(read_photo(result.source), result.faces, result.probabilities, model.classes), target)
            bar.update()
    if not args.json:
        print(f"{faces} faces in {photos} of {len(files)} photos" + (f"; annotated copies in {args.save}" if args.save else ""))


if __name__ == "__main__":
    main()
