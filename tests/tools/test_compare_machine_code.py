"""What compare_machine_code sees of a cubin, on small files that are made here: no GPU and no toolkit is needed."""

import struct

import pytest

from tools import compare_machine_code as compare

KERNEL = "_Z4axpyPKf"
PROGBITS, NOBITS = 1, 8


def make_cubin(*parts: tuple[str, int, int, bytes]) -> bytes:
    """Write an ELF file with sections of these names, types, sh_info fields and contents."""
    names, name_offsets = b"\0", []
    for name in (".shstrtab", *(part[0] for part in parts)):
        name_offsets.append(len(names))
        names += name.encode() + b"\0"
    rows = [(3, 0, names), *(part[1:] for part in parts)]
    content, headers = b"", [bytes(64)]
    for offset, (kind, info, data) in zip(name_offsets, rows, strict=True):
        headers.append(struct.pack("<IIQQQQIIQQ", offset, kind, 0, 0, 64 + len(content), len(data), 0, info, 1, 0))
        if kind != NOBITS:
            content += data
    start = b"\x7fELF\x02\x01".ljust(0x28, b"\0") + struct.pack("<Q", 64 + len(content))
    start = start.ljust(0x3A, b"\0") + struct.pack("<HHH", 64, len(headers), 1)
    return start.ljust(64, b"\0") + content + b"".join(headers)


def kernel(code: bytes = b"code", registers: int = 32, symbol: int = 7, shared: int = 64, constants: bytes = b"c"):
    return make_cubin(
        (f".text.{KERNEL}", PROGBITS, registers << 24 | symbol, code),
        (f".nv.constant0.{KERNEL}", PROGBITS, 0, constants),
        (f".nv.shared.{KERNEL}", NOBITS, 0, bytes(shared)),
        (".debug_frame", PROGBITS, 0, b"debug"),
    )


@pytest.mark.parametrize(
    "change", [{"code": b"c0de"}, {"registers": 33}, {"shared": 128}, {"constants": b"d"}, {"code": b"code more"}]
)
def test_every_part_of_a_kernel_counts(change: dict) -> None:
    old, new = compare.kernel_digests(kernel()), compare.kernel_digests(kernel(**change))
    assert old.keys() == new.keys() == {KERNEL}
    assert old != new


def test_the_order_of_a_file_does_not_count() -> None:
    other = make_cubin((".text._Z5otherv", PROGBITS, 0, b"other"))
    assert compare.kernel_digests(kernel(symbol=9)) == compare.kernel_digests(kernel())
    assert compare.kernel_digests(other).keys() == {"_Z5otherv"}


def test_what_is_no_elf_file_is_refused() -> None:
    with pytest.raises(ValueError, match="not a 64-bit little-endian ELF file"):
        compare.kernel_digests(b"!<arch>\n")


def test_names_of_files_are_left_out() -> None:
    moved = [
        "_ZN3lib46_GLOBAL__N__83e212f2_13_gemm_plain_cu_91da8c8510gemm_plainIfEEvNS_10GemmParamsE",
        "_ZN3lib40_GLOBAL__N__2f8a77aa_8_plain_cu_5a2c98d910gemm_plainIfEEvNS_10GemmParamsE",
    ]
    assert {compare.without_file_names(name) for name in moved} == {
        "_ZN3lib12_GLOBAL__N_110gemm_plainIfEEvNS_10GemmParamsE"
    }
    assert compare.without_file_names(KERNEL) == KERNEL


def test_differences_are_listed_by_architecture_and_kernel() -> None:
    old = {("sm_80", "a"): {"1"}, ("sm_90", "a"): {"1"}, ("sm_90", "b"): {"2"}, ("sm_90", "c"): {"3"}}
    new = {("sm_80", "a"): {"1"}, ("sm_90", "a"): {"9"}, ("sm_90", "c"): {"3", "4"}, ("sm_90", "d"): {"2"}}
    assert compare.differences(old, old) == []
    assert compare.differences(old, new) == [
        "differs: sm_90 a",
        "gone: sm_90 b",
        "differs: sm_90 c",
        "added: sm_90 d",
    ]
    assert compare.differences(compare.renamed(old, [("b", "d")]), new) == ["differs: sm_90 a", "differs: sm_90 c"]
