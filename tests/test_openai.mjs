// test_openai.mjs BASE_URL TRAINING_FILE - fine-tuning with npm's `openai`, unchanged but for its base URL.
// Prints one line per check, as the other tests do; run by test_openai.py.
import fs from "node:fs";
import OpenAI from "openai";

const [baseURL, path] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none" });
let bad = 0;
const check = (ok, what) => {
  console.log((ok ? "ok      " : "FAILED  ") + what);
  bad += ok ? 0 : 1;
};
const all = async (page) => {
  const out = [];
  for await (const x of page) out.push(x);
  return out;
};
const until = async (id, ...states) => {
  for (let i = 0; i < 3000; i++) {
    const job = await client.fineTuning.jobs.retrieve(id);
    if (states.includes(job.status) || ["failed", "cancelled", "succeeded"].includes(job.status)) return job;
    await new Promise((r) => setTimeout(r, 100));
  }
  throw new Error(`${id} does not become ${states}`);
};

const file = await client.files.create({ file: fs.createReadStream(path), purpose: "fine-tune" });
check(file.object === "file" && file.id.startsWith("file-") && file.bytes === fs.statSync(path).size, "files.create");
check((await client.files.retrieve(file.id)).filename === path.split("/").pop(), "files.retrieve");
check((await all(client.files.list())).some((f) => f.id === file.id), "files.list");
check((await (await client.files.content(file.id)).text()) === fs.readFileSync(path, "utf8"), "files.content");

const { data: base } = await client.models.list();
const job = await client.fineTuning.jobs.create({
  model: base[0].id,
  training_file: file.id,
  suffix: "ships",
  seed: 7,
  method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 3, batch_size: 2, learning_rate_multiplier: 10 } } },
  metadata: { team: "sales" },
});
check(job.object === "fine_tuning.job" && job.id.startsWith("ftjob-") && job.seed === 7, "fineTuning.jobs.create");
const done = await until(job.id, "succeeded");
check(done.status === "succeeded" && done.fine_tuned_model.startsWith("ft:") && done.trained_tokens > 0 && done.finished_at >= done.created_at,
  `fineTuning.jobs.retrieve: ${done.fine_tuned_model}`);

const other = await client.fineTuning.jobs.create({
  model: base[0].id, training_file: file.id, suffix: "long", method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 50, batch_size: 1 } } },
});
await until(other.id, "running");
await client.fineTuning.jobs.cancel(other.id);
check((await until(other.id, "cancelled")).status === "cancelled", "fineTuning.jobs.cancel");
const jobs = await all(client.fineTuning.jobs.list({ limit: 1 }));
check(jobs.map((j) => j.id).join() === [other.id, job.id].join(), "fineTuning.jobs.list, page by page");
check((await all(client.fineTuning.jobs.list({ metadata: { team: "sales" } }))).map((j) => j.id).join() === job.id, "the same by metadata");
const events = await all(client.fineTuning.jobs.listEvents(job.id, { limit: 5 }));
check(events.length > 5 && events.some((e) => /^Step \d+\/\d+: training loss=\d+\.\d\d/.test(e.message) && e.type === "metrics" && e.data.train_loss > 0),
  `fineTuning.jobs.listEvents: ${events.length}, page by page`);
const points = await all(client.fineTuning.jobs.checkpoints.list(job.id));
check(points.length > 0 && points[0].metrics.train_loss > 0 && points[0].fine_tuned_model_checkpoint.includes(":ckpt-step-"),
  `fineTuning.jobs.checkpoints.list: ${points.length}`);

const messages = [{ role: "user", content: "What is the colour of ship 3?" }];
for (const model of [done.fine_tuned_model, points[points.length - 1].fine_tuned_model_checkpoint, "ships"]) {
  const answer = await client.chat.completions.create({ model, messages, max_tokens: 12, temperature: 0 });
  check(answer.choices[0].message.role === "assistant" && answer.usage.completion_tokens > 0,
    `chat.completions with ${model}: ${JSON.stringify(answer.choices[0].message.content)}`);
}
let refused;
try {
  await client.fineTuning.jobs.retrieve("ftjob-none");
} catch (e) {
  refused = e;
}
check(refused instanceof OpenAI.NotFoundError && refused.code === "job_not_found", "what is not there is a NotFoundError");
process.exit(bad ? 1 : 0);
