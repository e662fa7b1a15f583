"""A partner's companies: `/companies…`."""

from collections.abc import Sequence
from dataclasses import fields as dataclass_fields
from http import HTTPStatus
from typing import Annotated, Final
from uuid import UUID

import msgspec

from gatelodge.errors import NoCredential
from gatelodge.strict import decode_base64url, encode_base64url
from gatelodge_server.core.companies import Companies, CompanyKey
from gatelodge_server.core.model import SECOND, Company, CompanyDetails
from gatelodge_server.core.refusals import CompanyExists, CompanyNotFound, IdempotencyKeyReused, IdempotencyKeySpent, NotAllowed
from gatelodge_server.core.secrets import Secret
from gatelodge_server.http.fields import (
    Address,
    Bic,
    Country,
    Email,
    Iban,
    Language,
    Name,
    PostalCode,
    State,
    TaxNumber,
    VatNumber,
)
from gatelodge_server.http.guard import Guard
from gatelodge_server.http.operation import Answer, Call, Operation, invalid_parameter
from gatelodge_server.http.problems import InvalidIdempotencyKey
from gatelodge_server.http.reach import WAIT_FOR_REACH, Count, ReachAnswer, ReachReport, wait_in
from gatelodge_server.http.sessions import CREDENTIAL_REFUSALS, rfc3339

_PAGE: Final = 50
_PAGE_MAX: Final = 200
_OVERLAP_MAX: Final = 86_400
_CREDENTIAL: Final = "the partner's API key or session JWT"
_REFUSALS: Final = (*CREDENTIAL_REFUSALS, NoCredential, NotAllowed)
_DETAILS: Final = tuple(field.name for field in dataclass_fields(CompanyDetails))


class CompanyBody(msgspec.Struct, rename="camel", frozen=True):
    """What a partner says about a company."""

    company_name: Name
    country: Country
    tax_number: TaxNumber
    vat_number: VatNumber | None = None
    language: Language | None = None
    address: Address | None = None
    city: Name | None = None
    state: State | None = None
    postal_code: PostalCode | None = None
    email: Email | None = None
    user_email: Email | None = None
    iban_number: Iban | None = None
    bic_number: Bic | None = None


class RotateBody(msgspec.Struct, rename="camel", frozen=True):
    """For how long the keys that the company has go on working."""

    overlap_seconds: Annotated[int, msgspec.Meta(ge=0, le=_OVERLAP_MAX)] = 0


class CompanyKeyAnswer(msgspec.Struct, rename="camel", frozen=True):
    """A company and its API key, shown this once."""

    company_id: str
    api_key: Secret


class RotatedCompanyKeyAnswer(CompanyKeyAnswer, rename="camel", frozen=True):
    """A company and its new API key, shown this once; for whoever asks with `wait`, who has heard that older keys end."""

    sequence: Count = msgspec.UNSET
    verifiers: Count = msgspec.UNSET
    acknowledged: Count = msgspec.UNSET


class CompanyAnswer(msgspec.Struct, rename="camel", frozen=True, omit_defaults=True):
    """A company as it was said to be."""

    company_id: str
    created_at: str
    company_name: str
    country: str
    tax_number: str
    vat_number: str | None = None
    language: str | None = None
    address: str | None = None
    city: str | None = None
    state: str | None = None
    postal_code: str | None = None
    email: str | None = None
    user_email: str | None = None
    iban_number: str | None = None
    bic_number: str | None = None


class CompaniesAnswer(msgspec.Struct, rename="camel", frozen=True):
    """A page of companies, newest first. `nextCursor` asks for the page after it and is `null` on the last."""

    companies: list[CompanyAnswer]
    next_cursor: str | None


class CompanyRoutes:
    """The handlers of `/companies…`."""

    def __init__(self, *, companies: Companies, guard: Guard, reach: ReachReport) -> None:
        self._companies = companies
        self._reach = reach
        self._guard = guard

    async def create(self, call: Call, body: CompanyBody) -> Answer:
        """Add a company and give it its first key."""
        partner_id = call.holder.partner_id
        details = CompanyDetails(**{name: getattr(body, name) for name in _DETAILS})
        key = await self._companies.create(partner_id, details, idempotency_key=call.idempotency_key())
        return Answer(HTTPStatus.CREATED, _key_answer(key))

    async def list_page(self, call: Call, _: None) -> Answer:
        """One page of the partner's companies."""
        partner_id = call.holder.partner_id
        query = call.query()
        limit = _limit_of(query.get("limit"))
        before = _company_of_cursor(query.get("cursor"))
        # One more than is asked for tells whether there is a next page.
        found = await self._companies.list_page(partner_id, before=before, limit=limit + 1)
        page = found[:limit]
        cursor = encode_base64url(page[-1].id.bytes).decode("ascii") if len(found) > limit else None
        return Answer(HTTPStatus.OK, CompaniesAnswer([_company_answer(company) for company in page], cursor))

    async def show(self, call: Call, _: None) -> Answer:
        """One company."""
        partner_id = call.holder.partner_id
        return Answer(HTTPStatus.OK, _company_answer(await self._companies.get(partner_id, _company_id(call))))

    async def rotate_key(self, call: Call, body: RotateBody | None) -> Answer:
        """Give a company a new key."""
        partner_id, wait = call.holder.partner_id, wait_in(call)
        overlap = body.overlap_seconds * SECOND if body is not None else 0
        key = await self._companies.rotate_key(
            partner_id, _company_id(call), overlap=overlap, idempotency_key=call.idempotency_key()
        )
        counts = await self._reach.counts(key.sequence, wait)
        return Answer(HTTPStatus.OK, RotatedCompanyKeyAnswer(str(key.company_id), key.api_key, **counts))

    async def delete(self, call: Call, _: None) -> Answer:
        """End a company."""
        partner_id, wait = call.holder.partner_id, wait_in(call)
        return await self._reach.answer(await self._companies.delete(partner_id, _company_id(call)), wait)

    def operations(self) -> Sequence[Operation]:
        """What is served here."""
        replays = (IdempotencyKeyReused, IdempotencyKeySpent, InvalidIdempotencyKey)
        create = [
            Operation(
                method="POST",
                path=path,
                tag="Companies",
                summary=summary,
                description=(
                    "Add a company of the partner and give it an API key, which is shown this once. Sent again with the same "
                    "`Idempotency-Key` within ten minutes, while the key is unused, it gives the same answer."
                ),
                handler=self.create,
                body=CompanyBody,
                answers={201: CompanyKeyAnswer},
                refusals=(*_REFUSALS, CompanyExists, *replays),
                credential=_CREDENTIAL,
                admit=self._guard.partner,
                idempotent_by_key=True,
            )
            for path, summary in (
                ("/companies", "Create a company"),
                ("/white-label-partner/create-company", "Create a company (alias)"),
            )
        ]
        return [
            *create,
            Operation(
                method="GET",
                path="/companies",
                tag="Companies",
                summary="List companies",
                handler=self.list_page,
                answers={200: CompaniesAnswer},
                refusals=_REFUSALS,
                credential=_CREDENTIAL,
                admit=self._guard.partner,
                parameters={
                    "limit": f"How many to give, 1 to {_PAGE_MAX}; {_PAGE} unless told.",
                    "cursor": "`nextCursor` of the page before.",
                },
            ),
            Operation(
                method="GET",
                path="/companies/{companyId}",
                tag="Companies",
                summary="Show a company",
                handler=self.show,
                answers={200: CompanyAnswer},
                refusals=(*_REFUSALS, CompanyNotFound),
                credential=_CREDENTIAL,
                admit=self._guard.partner,
            ),
            Operation(
                method="POST",
                path="/companies/{companyId}/key",
                tag="Companies",
                summary="Rotate a company's API key",
                description="Give the company a new API key. The keys that it has end at once, or after `overlapSeconds`.",
                handler=self.rotate_key,
                body=RotateBody,
                body_optional=True,
                answers={200: RotatedCompanyKeyAnswer},
                parameters=WAIT_FOR_REACH,
                refusals=(*_REFUSALS, CompanyNotFound, *replays),
                credential=_CREDENTIAL,
                admit=self._guard.partner,
                idempotent_by_key=True,
            ),
            Operation(
                method="DELETE",
                path="/companies/{companyId}",
                tag="Companies",
                summary="Delete a company",
                description="End the company, its API keys and its sessions.",
                handler=self.delete,
                answers={204: None, 200: ReachAnswer},
                parameters=WAIT_FOR_REACH,
                refusals=(*_REFUSALS, CompanyNotFound),
                credential=_CREDENTIAL,
                admit=self._guard.partner,
            ),
        ]


def _key_answer(key: CompanyKey) -> CompanyKeyAnswer:
    return CompanyKeyAnswer(str(key.company_id), key.api_key)


def _company_answer(company: Company) -> CompanyAnswer:
    details = {name: getattr(company.details, name) for name in _DETAILS}
    return CompanyAnswer(company_id=str(company.id), created_at=rfc3339(company.created_at), **details)


def _company_id(call: Call) -> UUID:
    text = call.parameters["companyId"]
    try:
        company_id = UUID(text)
    except ValueError:
        raise CompanyNotFound from None
    if str(company_id) != text.lower():  # of the many spellings that UUID() takes, the one that we give out
        raise CompanyNotFound
    return company_id


def _limit_of(text: str | None) -> int:
    if text is None:
        return _PAGE
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= _PAGE_MAX):  # noqa: PLR2004
        raise invalid_parameter("limit", f"must be a whole number from 1 to {_PAGE_MAX}")
    return int(text)


def _company_of_cursor(text: str | None) -> UUID | None:
    if text is None:
        return None
    raw = decode_base64url(text) if text.isascii() else None
    if raw is None or len(raw) != 16:  # noqa: PLR2004 - bytes of a UUID
        raise invalid_parameter("cursor", "must be the `nextCursor` of an earlier answer")
    return UUID(bytes=raw)
