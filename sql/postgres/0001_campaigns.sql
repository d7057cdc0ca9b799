-- Projects. The API calls the id of one of these rows projectId.
CREATE TABLE campaigns (
    id         integer     GENERATED ALWAYS AS IDENTITY,
    name       text        NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT campaigns_pkey PRIMARY KEY (id)
);

INSERT INTO campaigns (name) VALUES ('Первая запись');
