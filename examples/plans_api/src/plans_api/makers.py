"""Who builds a vehicle: world manufacturer identifiers (ISO 3780), the first three characters of a VIN.

The table has the makers that are common in the United States; a code that is not in it is no fault of its vehicle, and still
tells the country.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, NamedTuple


class Kind(StrEnum):
    """What the vehicles of a code are, as far as 49 CFR 565 treats them differently."""

    LIGHT = "light"
    """Cars, and vans, sport utilities and trucks of up to 10 000 pounds."""
    HEAVY = "heavy"
    MOTORCYCLE = "motorcycle"


class Maker(NamedTuple):
    """To whom a code is assigned, and for which make; there is none where several makes share a code."""

    make: str | None
    manufacturer: str | None
    kind: Kind


_GM, _FORD, _FCA, _AMC = "General Motors", "Ford", "Chrysler (FCA, Stellantis)", "American Motors"
_HONDA, _TOYOTA, _NISSAN, _MAZDA = "Honda", "Toyota", "Nissan", "Mazda"
_HYUNDAI, _VW, _BMW, _MERCEDES = "Hyundai Motor Group", "Volkswagen Group", "BMW", "Mercedes-Benz"
_JLR, _PACCAR, _DAIMLER_TRUCK, _VOLVO = "Jaguar Land Rover", "Paccar", "Daimler Truck", "Volvo Group"

_LIGHT: Final = (
    (None, _FCA, "1C3 1C4 2C3 2C4 3C3 3C4 3B3 ZAC ZFB"),
    (None, _GM, "1G5 1GH 2CK 2CN 2C1 JG1 3G0 4GD"),
    (None, _HYUNDAI, "3KP 5NM KMU"),
    (None, _NISSAN, "5N1 JN1 JN8"),
    (None, _TOYOTA, "5TD JTM"),
    ("Acura", _HONDA, "19U 19V 2HH 2HN 4W5 5FR 5J8 5KC JAE JH4"),
    ("Alfa Romeo", _FCA, "ZAR ZAS"),
    ("American Motors", _AMC, "1AC 1AM 2CM"),
    ("Aston Martin", "Aston Martin Lagonda", "SCF SD7"),
    ("Audi", _VW, "TRU WA1 WAU WU1 WUA"),
    ("BMW", _BMW, "3MF 3MW 4US 5UM 5UX 5YM WB5 WBA WBS WBX WBY"),
    ("Bentley", _VW, "SCB SJA"),
    ("Buick", _GM, "1G4 2G4 3G4 3G5 5GA KL4 LRB W04"),
    ("Cadillac", _GM, "1G6 1GY 2G6 3GG 3GY LRE LSG"),
    ("Chevrolet", _GM, "1G1 1GC 1GN 2G1 2G8 2GC 2GN 3G1 3GC 3GM 3GN 4G1 6G1 6G3 KL1 KL7 KL8"),
    ("Chrysler", _FCA, "1A4 1A8 1C8 2A3 2A4 2A8 2C8 2CA 3A4 3A8 3C8 3CA 4C3"),
    ("Daewoo", "Daewoo", "KLA"),
    ("Dodge", _FCA, "1B3 1B4 1B7 1B8 1D3 1D4 1D7 1D8 2B3 2B4 2B7 2B8 2D3 2D4 2D7 2D8 3B4 3B7 3B8 3D3 3D4 3D7 3D8 4B3 JB3 JB7"),
    ("Eagle", _FCA, "1E3 2E3 4E3 JE3 JE4"),
    ("Ferrari", "Ferrari", "ZFF ZSG"),
    ("Fiat", _FCA, "3E4 ZFA"),
    ("Fisker", "Fisker", "VCF YH4"),
    ("Ford", _FORD, "1F1 1F7 1FA 1FM 1FT 1ZV 2FA 2FM 2FT 3FA 3FM 3FN 3FT KNJ MAJ NM0 WF0"),
    ("GMC", _GM, "1GK 1GT 2CT 2GK 2GT 3GK 3GT"),
    ("Genesis", _HYUNDAI, "KMT"),
    ("Honda", _HONDA, "19X 1HG 2HG 2HJ 2HK 3CZ 3GP 3HG 4S6 5FN 5FP 5J6 5J7 5KB 7FA JHL JHM SHH SHS"),
    ("Hummer", _GM, "5GN 5GR 5GT"),
    ("Hyundai", _HYUNDAI, "5NP 5NT KM8 KMH"),
    ("Infiniti", _NISSAN, "5N3 JNK JNR"),
    ("Isuzu", "Isuzu", "1GG 4NU 4S1 4S2 JAA JAB JAC JR2"),
    ("Jaguar", _JLR, "SAD SAJ"),
    ("Jeep", _FCA, "1J4 1J7 1J8 1JC 1JT 2BC 2J4 3J4"),
    ("Kia", _HYUNDAI, "5XX 5XY KNA KND"),
    ("Lamborghini", _VW, "ZHW ZPB"),
    ("Land Rover", _JLR, "SAL"),
    ("Lexus", _TOYOTA, "2T2 58A JT6 JT8 JTH JTJ"),
    ("Lincoln", _FORD, "1L1 1LN 1MR 2LM 2LN 3LN 5L1 5LM 5LT"),
    ("Lotus", "Lotus", "SCC"),
    ("Lucid", "Lucid", "50E"),
    ("Maserati", _FCA, "ZAM ZN6"),
    ("Mazda", _MAZDA, "1YV 3MD 3MV 3MZ 4F2 4F4 7MM JM1 JM2 JM3"),
    ("McLaren", "McLaren", "SBM"),
    ("Mercedes-Benz", _MERCEDES, "4JG 55S W1K W1N W1W W1Y WD3 WDB WDC WDD"),
    ("Mercury", _FORD, "1ME 1ZW 2ME 2MR 3MA 3ME 4M2 4M4 6MP"),
    ("Mini", _BMW, "WMW WMZ"),
    ("Mitsubishi", "Mitsubishi", "1Z3 1Z4 1Z7 4A3 4A4 4P3 6MM JA3 JA4 JA7 ML3"),
    ("Nissan", _NISSAN, "1N4 1N6 3N1 3N8 4N2 KNM"),
    ("Oldsmobile", _GM, "1G3 2G3 3G3"),
    ("Plymouth", _FCA, "1P3 1P4 1P7 2P3 2P4 2P7 3P3 3P4 JP3 JP7"),
    ("Polestar", "Polestar", "LPS YSM"),
    ("Pontiac", _GM, "1G2 1G7 1GM 2C2 2CG 2G2 2G7 3G2 3G7 4G2 5Y2 6G2 KL2"),
    ("Porsche", _VW, "WP0 WP1"),
    ("Ram", _FCA, "1C6 3C6 3C7"),
    ("Rivian", "Rivian", "7FC 7PD"),
    ("Rolls-Royce", _BMW, "SCA SLA"),
    ("Saab", "Saab", "5S3 JF4 YK1 YS3"),
    ("Saturn", _GM, "1G8 3GS 5GZ"),
    ("Smart", _MERCEDES, "WME"),
    ("Subaru", "Subaru", "4S3 4S4 JF1 JF2 JF3"),
    ("Suzuki", "Suzuki", "2S2 2S3 5Z6 JS2 JS3 JS4 KL5"),
    ("Tesla", "Tesla", "5YJ 7G2 7SA LRW XP7"),
    (
        "Toyota",
        _TOYOTA,
        "1NX 2T1 2T3 3MY 3TM 3TY 4T1 4T3 4T4 4TA 5TB 5TE 5TF 5YF 7MU 7SV JT2 JT3 JT4 JT5 JTD JTE JTK JTL JTN NMT VNK WZ1",
    ),
    ("VinFast", "VinFast", "RLL"),
    ("Volkswagen", _VW, "1V1 1V2 1VW 2V4 2V8 3VV 3VW 9BW WV1 WV2 WVG WVW"),
    ("Volvo", "Volvo Cars", "7JR LVY LYV YV1 YV4"),
    ("Yugo", "Zastava", "VX1"),
)
_HEAVY: Final = (
    ("Freightliner", _DAIMLER_TRUCK, "1FU 1FV 2FU 2FV 3AK"),
    ("Hino", "Hino", "2AZ 7H4 JH7 JHA"),
    ("International", "Navistar", "1HS 1HT 2HS 3HS"),
    ("Kenworth", _PACCAR, "1XK 2XK 3WK 3XK"),
    ("Mack", _VOLVO, "1M1 1M2 2M1"),
    ("Peterbilt", _PACCAR, "1XP 2XP 3WP"),
    ("Sterling", _DAIMLER_TRUCK, "2FW 2FZ"),
    ("Volvo", _VOLVO, "4V4 4VA 4VG"),
    ("Western Star", _DAIMLER_TRUCK, "2WK 2WL 5KJ"),
)
_MOTORCYCLES: Final = (
    ("Aprilia", "Piaggio", "ZD4"),
    ("BMW", _BMW, "WB1 WB3"),
    ("Ducati", "Ducati", "ZDM"),
    ("Harley-Davidson", "Harley-Davidson", "1HD 5HD"),
    ("Honda", _HONDA, "1HF JH2 JH3"),
    ("Indian", "Polaris", "56K"),
    ("KTM", "KTM", "VBK"),
    ("Kawasaki", "Kawasaki", "JKA JKB"),
    ("Suzuki", "Suzuki", "JS1"),
    ("Triumph", "Triumph Motorcycles", "SMT"),
    ("Yamaha", "Yamaha", "JYA JYE"),
)

MAKERS: Final[Mapping[str, Maker]] = {
    wmi: Maker(make, manufacturer, kind)
    for kind, rows in ((Kind.LIGHT, _LIGHT), (Kind.HEAVY, _HEAVY), (Kind.MOTORCYCLE, _MOTORCYCLES))
    for make, manufacturer, wmis in rows
    for wmi in wmis.split()
}

_ORDER: Final = "ABCDEFGHJKLMNPRSTUVWXYZ1234567890"
"""ISO 3780 lists the second character in this order: letters, then 1 to 9, then 0."""
_COUNTRIES: Final = (
    ("1", "A0", "United States"),
    ("2", "A0", "Canada"),
    ("3", "AX", "Mexico"),
    ("4", "A0", "United States"),
    ("5", "A0", "United States"),
    ("6", "AX", "Australia"),
    ("6", "Y1", "New Zealand"),
    ("7", "A0", "United States"),
    ("8", "AE", "Argentina"),
    ("8", "FG", "Chile"),
    ("9", "AE", "Brazil"),
    ("9", "39", "Brazil"),
    ("A", "AH", "South Africa"),
    ("J", "A0", "Japan"),
    ("K", "LR", "South Korea"),
    ("L", "A0", "China"),
    ("M", "AE", "India"),
    ("M", "FK", "Indonesia"),
    ("M", "LR", "Thailand"),
    ("N", "LR", "Turkey"),
    ("P", "LR", "Malaysia"),
    ("R", "FG", "Taiwan"),
    ("R", "LR", "Vietnam"),
    ("S", "AM", "United Kingdom"),
    ("S", "NT", "Germany"),
    ("S", "UZ", "Poland"),
    ("T", "AH", "Switzerland"),
    ("T", "JP", "Czechia"),
    ("T", "RV", "Hungary"),
    ("U", "UZ", "Romania"),
    ("U", "57", "Slovakia"),
    ("V", "AE", "Austria"),
    ("V", "FR", "France"),
    ("V", "SW", "Spain"),
    ("V", "X2", "Serbia"),
    ("W", "A0", "Germany"),
    ("X", "LR", "Netherlands"),
    ("Y", "AE", "Belgium"),
    ("Y", "FK", "Finland"),
    ("Y", "SW", "Sweden"),
    ("Z", "AU", "Italy"),
)

COUNTRIES: Final[Mapping[str, str]] = {
    first + second: country
    for first, (low, high), country in _COUNTRIES
    for second in _ORDER[_ORDER.index(low) : _ORDER.index(high) + 1]
}
"""The country by the first two characters: that of the authority that has assigned the code, which need not be the plant's."""
