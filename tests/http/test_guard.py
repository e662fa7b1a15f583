"""Which kind of credential each call of the service is for."""

from outside import ask, bearer, create_company, id_of, log_in, outcome

GOOD = (200, None)
NOT_ALLOWED = (403, "insufficient_scope")


def issue(server, partner):
    """An access token of the partner, and its id."""
    issued = ask("token", "issue", partner.id, data=server.data)
    return issued["token"], issued["tokenId"]


def test_r9_an_access_token_is_for_the_api_and_opens_nothing_of_the_service(client, server, partner):
    token, _ = issue(server, partner)
    assert outcome(client.get("/companies", headers=bearer(token))) == NOT_ALLOWED
    assert outcome(client.post("/companies", headers=bearer(token), json={})) == NOT_ALLOWED
    assert outcome(client.post("/auth/login", json={"apiKey": token})) == (401, "invalid_credential")
    assert outcome(client.post("/auth/refresh", json={"refreshToken": token})) == (401, "invalid_credential")
    assert outcome(client.post("/auth/logout", headers=bearer(token))) == (401, "invalid_credential")


def test_r25_a_revoked_access_token_is_told_so_by_the_service_too(client, server, partner):
    token, token_id = issue(server, partner)
    assert outcome(client.get("/companies", headers=bearer(token))) == NOT_ALLOWED
    ask("token", "revoke", token_id, data=server.data)
    assert outcome(client.get("/companies", headers=bearer(token))) == (401, "credential_revoked")


def test_r25_what_a_command_has_ended_a_running_server_refuses_with_its_next_answer(client, server, partner):
    """The command runs in another process; when it has returned, the bell has rung in the server's."""
    jwt = log_in(client, partner.key)["jwt"]
    for credential in (partner.key, jwt):
        assert outcome(client.get("/companies", headers=bearer(credential))) == GOOD
    ask("key", "revoke", id_of(partner.key), data=server.data)
    for credential in (partner.key, jwt):
        assert outcome(client.get("/companies", headers=bearer(credential))) == (401, "credential_revoked")


def test_a_companys_credentials_are_not_for_companies(client, partner):
    made = create_company(client, partner.key)
    jwt = log_in(client, made["apiKey"])["jwt"]
    for credential in (made["apiKey"], jwt):
        assert outcome(client.get("/companies", headers=bearer(credential))) == NOT_ALLOWED


def test_an_api_key_ends_no_session_of_its_own(client, partner):
    jwt = log_in(client, partner.key)["jwt"]
    assert outcome(client.post("/auth/logout", headers=bearer(partner.key))) == (401, "invalid_credential")
    assert outcome(client.get("/companies", headers=bearer(jwt))) == GOOD
    assert client.post("/auth/logout", headers=bearer(jwt)).status_code == 204
    assert outcome(client.get("/companies", headers=bearer(jwt))) == (401, "credential_revoked")
