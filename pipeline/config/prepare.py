"""Config of the stage prepare: the sources by their `kind`, their weights, the filters. Knows no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PlainValidator, field_validator, model_validator

from pipeline.config.base import Config, added, operational
from pipeline.core.credentials import take_password_out
from pipeline.core.image_size import ImageSize, image_size

# It was part of identities and fingerprints. There it stays, as it was by default, so that those of before still hold.
NO_LONGER_DECIDES: dict[str, object] = {"max_rejected_fraction": 0.1}

Storage = Literal["png", "webp", "jpeg", "in-place"]

# What is written down of it has no name and password; this process and its children remember them.
Url = Annotated[str, AfterValidator(take_password_out)]


class FilterConfig(Config):
    """What a sample must be to be kept. Samples that are not are counted by reason and listed in rejected.jsonl."""

    min_side: int = Field(1, ge=1, description="pixels of the shorter side, before cropping")
    max_aspect_ratio: float = Field(3.0, ge=1, description="longer side / shorter side")
    max_pixels: int = Field(64_000_000, ge=1, description="more is taken for a decompression bomb and not decoded")
    min_caption_length: int = Field(1, ge=1, description="characters")
    max_caption_length: int = Field(1_000, ge=1, description="characters")
    near_duplicate_bits: int | None = Field(
        None,
        ge=0,
        le=4,
        description="images whose 64-bit perceptual hashes differ in at most so many bits are one image: the first "
        "is kept; null: off; 3 finds most copies of another size or JPEG quality",
    )

    @model_validator(mode="after")
    def _check(self) -> FilterConfig:
        if self.min_caption_length > self.max_caption_length:
            raise ValueError("min_caption_length must not exceed max_caption_length")
        return self


class _Source(Config):
    weight: float = Field(
        1.0,
        gt=0,
        json_schema_extra={"operational": True, "decides": "trainings"},
        description="of one of prepare.sources: trainings draw weight / sum of weights of their samples from it, "
        "rounded to thousandths, in every 1,000 samples in a row; nothing is prepared again for another weight, and "
        "a training takes it with --amend",
    )
    filters: FilterConfig | None = added(
        None, description="of one of prepare.sources, in place of prepare.filters; null: those"
    )
    frozen: bool = operational(
        False, description="true: a finished prepare counts, whatever becomes of the source; nobody looks at it again"
    )


class OpenMojiSource(_Source):
    """The demo's corpus: 1,918 OpenMoji images (CC BY-SA 4.0) with their names, from pip packages."""

    kind: Literal["openmoji"]
    limit: int | None = Field(None, ge=1, description="only the first so many, in the order of their code points")
    without: tuple[Literal["people", "flags"], ...] = added(
        (), description="leave these out; people are all that come in skin tones, hands, too"
    )
    colored: int = added(
        0,
        ge=0,
        le=9,
        description="so many more images, in other colors, of each food, plant, animal and vehicle: 'blue lemon'",
    )
    grayscale: float = added(
        0, ge=0, le=1, description="the share of those that come without color, too: 'grayscale lemon'"
    )
    paired: int = added(0, ge=0, description="so many more images of two of those: 'lemon and cat'")


class FolderSource(_Source):
    """Images in a folder (recursively), each with its caption in a `.txt` file of the same name beside it.

    Or with the name of its folder, for transformer.condition=class.
    """

    kind: Literal["folder"]
    path: Url = Field(min_length=1, description="local path or fsspec URL")
    extensions: tuple[str, ...] = Field(
        (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
        description="files that are images, in lower case",
    )
    captions: Literal["files", "folders"] = added(
        "files", description="folders: the name of the folder that an image lies in, as data sets of classes have it"
    )

    @field_validator("extensions")
    @classmethod
    def _dotted(cls, extensions: tuple[str, ...]) -> tuple[str, ...]:
        if not extensions or not all(e.startswith(".") and e == e.lower() for e in extensions):
            raise ValueError("extensions must be lower-case with a dot, e.g. ['.png', '.jpg']")
        return extensions


class TableSource(_Source):
    """A CSV, JSONL or Parquet table: one image per row, by path or (Parquet) by bytes.

    Relative image paths start at the table's own folder.
    """

    kind: Literal["table"]
    path: Url = Field(min_length=1, description="local path or fsspec URL; the extension says the format")
    caption_column: str = Field("caption", description="column with the caption")
    path_column: str | None = Field(None, description="column with the path of the image")
    bytes_column: str | None = Field(None, description="column with the encoded image itself (Parquet only)")
    image_column: str | None = added(
        None,
        description="column with the image as it may be: bytes, a path, or {bytes, path} as the Hugging Face hub has "
        "it; a Parquet table with one column of that last kind finds it by itself",
    )
    key_column: str | None = Field(None, description="column with a unique key; None: made of image and caption")
    group_column: str | None = Field(None, description="rows with the same value here are never split")

    @field_validator("path")
    @classmethod
    def _known_format(cls, path: str) -> str:
        if not path.lower().endswith((".csv", ".jsonl", ".parquet")):
            raise ValueError("expected a path that ends in .csv, .jsonl or .parquet")
        return path

    @model_validator(mode="after")
    def _one_image_column(self) -> TableSource:
        given = [name for name in (self.path_column, self.bytes_column, self.image_column) if name is not None]
        parquet = self.path.lower().endswith(".parquet")
        if len(given) > 1 or not (given or parquet):
            raise ValueError("set exactly one of path_column, bytes_column and image_column")
        if self.bytes_column and not parquet:
            raise ValueError("bytes_column needs a .parquet table; CSV and JSONL hold paths (path_column)")
        return self


class WebDatasetSource(_Source):
    """Tars as img2dataset and webdataset write them: KEY.jpg|png|webp, KEY.txt, KEY.json, beside each other.

    Without a caption, a class in KEY.cls.
    """

    kind: Literal["webdataset"]
    urls: tuple[Url, ...] | Url = Field(
        description="paths or fsspec URLs; globs and braces, e.g. data/{00000..00099}.tar"
    )
    group_field: str | None = Field(None, description="samples with the same value of it in KEY.json are never split")
    key_pattern: str | None = added(
        None,
        description="regular expression whose first group is the key in a file's name, e.g. '(.*)_(?:image|text)[.]'; "
        "null: up to the first dot, or up to the last where that tells images apart",
    )
    group: Literal["adjacent", "buffered"] = added(
        "adjacent",
        description="whether the files of a sample lie side by side, as they should; buffered: a tar at a time is held "
        "in memory, and they may lie anywhere",
    )

    @field_validator("key_pattern")
    @classmethod
    def _has_a_group(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                groups = re.compile(pattern).groups
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"not a regular expression: {error}") from error
            if not groups:
                raise ValueError("expected a regular expression with a group (in parentheses) that is the key")
        return pattern


class HuggingFaceSource(_Source):
    """A data set that the `datasets` library saved to disk (`save_to_disk`)."""

    kind: Literal["huggingface"]
    path: Url = Field(min_length=1, description="local path or fsspec URL")
    split: str | None = Field(None, description="needed when the folder holds several splits")
    image_column: str = Field("image", description="column with the image")
    caption_column: str = Field("caption", description="column with the caption")
    key_column: str | None = Field(None, description="column with a unique key; None: made of image and caption")
    group_column: str | None = Field(None, description="rows with the same value here are never split")


class ShapesSource(_Source):
    """Drawn scenes of one to four shapes with captions by a grammar, whose images a judge reads back from pixels."""

    kind: Literal["shapes"]
    samples: int = Field(20_000, ge=1, description="scenes")
    seed: int = Field(0, ge=0, description="another one draws other scenes")
    grid: int | None = added(
        None, ge=4, le=256, description="cells on a side of a grid in whose cells the shapes lie; null: anywhere"
    )


Source = Annotated[
    OpenMojiSource | FolderSource | TableSource | WebDatasetSource | HuggingFaceSource | ShapesSource,
    Field(discriminator="kind"),
]


def _image_size(value: object) -> ImageSize:
    sides = list(value) if isinstance(value, (list, tuple)) else [value]
    whole = [side for side in sides if isinstance(side, int) and not isinstance(side, bool) and 8 <= side <= 2_048]
    if len(whole) != len(sides) or len(sides) != (2 if isinstance(value, (list, tuple)) else 1):
        raise ValueError("expected pixels, 8 to 2048, or [height, width] of such")
    return image_size(whole if len(whole) == 2 else whole[0])


class PrepareConfig(Config):
    """Section `prepare`: from a source, or several, to image shards."""

    source: Source | None = Field(None, description="where captioned images come from; or sources")
    sources: tuple[Source, ...] | None = added(
        None, min_length=1, max_length=100, description="several in place of one, each with its weight and its filters"
    )
    image_size: Annotated[ImageSize, PlainValidator(_image_size)] = Field(
        description="pixels of each side of the images that are stored, 8 to 2048; or [height, width]"
    )
    crop: Literal["center", "random"] = Field(
        "center", description="which part of an image is kept; random: drawn once, from the key and the seed"
    )
    caption: Literal["first", "all", "random"] = added(
        "first",
        description="of several captions of an image: the first one; all, a sample each (in the same split); random: "
        "all, of which training takes another one each epoch, and everything else the first",
    )
    storage: Storage = added(
        "png",
        description="format of the stored images. webp: lossless, the same pixels as png in 0.8 of its bytes, ten "
        "times as fast to write; jpeg, for photographs: a third of its bytes, and of JPEGs at least twice as large as "
        "image_size a fraction is decoded, which is several times as fast again; in-place: nothing is copied, and "
        "images are read, cropped and resized from the source's own tars, which must stay, uncompressed",
    )
    jpeg_quality: int = added(95, ge=1, le=100, description="of storage=jpeg")
    shard_size: int = Field(1_000, ge=1, description="source samples per shard; an input tar always becomes one shard")
    validation_fraction: float = Field(0.02, ge=0, lt=1, description="chosen by a hash of the key or group")
    filters: FilterConfig = Field(default_factory=lambda: FilterConfig.model_validate({}))
    max_rejected_fraction: float = operational(
        0.1, ge=0, le=1, description="the stage fails when more samples are rejected; nothing is made again for another"
    )
    workers: int | None = operational(None, ge=1, description="processes; None: one per core")
    verify: bool = operational(
        False,
        description="of a stage that is not finished: compare the tars of finished parts with their checksums, and make"
        " those anew that are damaged; otherwise a restart looks at their sizes",
    )

    @property
    def all_sources(self) -> tuple[Source, ...]:
        """The one source, or all of several."""
        return self.sources or ((self.source,) if self.source is not None else ())

    @property
    def source_names(self) -> tuple[str, ...]:
        """What each of several sources is called in logs and metrics: `folder-0`."""
        return tuple(f"{source.kind}-{number}" for number, source in enumerate(self.all_sources))

    @property
    def source_shares(self) -> tuple[int, ...]:
        """How many of each 1,000 samples of a training come from each of several sources; of one, empty."""
        if len(self.all_sources) == 1:
            return ()
        return shares_of([source.weight for source in self.all_sources])

    def of_each_source(self) -> tuple[PrepareConfig, ...]:
        """The same for each source alone, with its filters."""
        return tuple(
            self.model_copy(
                update={"sources": None, "source": _alone(source), "filters": source.filters or self.filters}
            )
            for source in self.all_sources
        )

    @model_validator(mode="after")
    def _some_source(self) -> PrepareConfig:
        if (self.source is None) == (self.sources is None):
            found = "none" if self.source is None else "both"
            raise ValueError(f"expected one of prepare.source and prepare.sources, found {found}")
        if self.source is not None and _alone(self.source) != self.source:
            raise ValueError(
                "source: weight and filters are of prepare.sources, of which there are several: leave the weight out,"
                " and set prepare.filters"
            )
        weak = [name for name, share in zip(self.source_names, self.source_shares, strict=False) if share == 0]
        if weak:
            raise ValueError(
                f"sources: expected weights of at least a thousandth of their sum, found less at {', '.join(weak)}:"
                " raise it, or leave that source out"
            )
        return self

    @model_validator(mode="after")
    def _in_place_in_tars(self) -> PrepareConfig:
        for source in self.all_sources if self.storage == "in-place" else ():
            if source.kind != "webdataset":
                raise ValueError(
                    f"storage: in-place reads tars where they are: expected a source of kind webdataset, found "
                    f"{source.kind}: set storage to png, webp or jpeg"
                )
        return self

    @model_validator(mode="after")
    def _quality_of_a_jpeg(self) -> PrepareConfig:
        if self.storage != "jpeg" and self.jpeg_quality != PrepareConfig.model_fields["jpeg_quality"].default:
            raise ValueError(f"jpeg_quality is of storage: jpeg, found storage: {self.storage}: remove it")
        return self

    @model_validator(mode="after")
    def _captions_of_one_image(self) -> PrepareConfig:
        if self.caption == "all" and any(c.filters.near_duplicate_bits is not None for c in self.of_each_source()):
            raise ValueError(
                "caption: all makes several samples of one image, of which filters.near_duplicate_bits would keep one: "
                "set near_duplicate_bits to null, or caption to first"
            )
        return self


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Integers that sum to 1,000 and are as `weights`, by largest remainder; of equal ones the first gets more."""
    scaled = [Fraction(weight) * 1_000 / sum(map(Fraction, weights)) for weight in weights]
    shares = [int(exact) for exact in scaled]
    by_remainder = sorted(range(len(weights)), key=lambda number: (shares[number] - scaled[number], number))
    for number in by_remainder[: 1_000 - sum(shares)]:
        shares[number] += 1
    return tuple(shares)


def _alone(source: Source) -> Source:
    """A source of several as the only one."""
    return source.model_copy(update={"weight": 1.0, "filters": None})
