// Vercel's AI SDK: `node ai.mjs <provider>.<scenario>`. `responses` is what `openai("…")` speaks of itself.
import assert from "node:assert/strict";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { colour, greedy, model, numbers, picture, question, run, toolUser, url, weather } from "./scenario.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false;
const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const compatible = createOpenAICompatible({
  name: "mlx-manager", baseURL: `${url}/v1`, includeUsage: true, supportsStructuredOutputs: true,
});
const anthropic = createAnthropic({ baseURL: `${url}/v1`, apiKey: "none" });
const providers = { responses: openai, chat: openai.chat, compatible, messages: anthropic };
const Weather = z.object({ city: z.enum(["Paris", "Tokyo"]), sky: z.enum(["clear", "cloudy"]) });
const common = { ...greedy, maxRetries: 0, maxOutputTokens: 300 };

function scenarios(provider) {
  const asked = { model: provider(model), ...common };
  return {
    async text() {
      const { text, finishReason, usage } = await generateText({ ...asked, prompt: "Count from 1 to 20." });
      assert.equal(text, numbers);
      assert.equal(finishReason, "stop");
      assert.ok(usage.inputTokens > 0 && usage.outputTokens >= 20);
    },
    async stream() {
      const result = streamText({ ...asked, prompt: "Count from 1 to 20.", onError: ({ error }) => { throw error; } });
      const pieces = [];
      for await (const piece of result.textStream) pieces.push(piece);
      assert.equal(pieces.join(""), numbers);
      assert.ok(pieces.length > 5);
      assert.equal(await result.finishReason, "stop");
      assert.ok((await result.usage).outputTokens >= 20);
    },
    async tools() {
      const cities = [];
      const tools = {
        get_weather: tool({
          description: "Get the current weather",
          inputSchema: z.object({ city: z.string().describe("The city name") }),
          execute: ({ city }) => (cities.push(city), weather),
        }),
      };
      const request = { ...asked, model: provider(toolUser), tools, stopWhen: stepCountIs(3), prompt: question };
      const whole = await generateText(request);
      assert.match(whole.text, /18 degrees, sunny/);
      const streamed = streamText(request);
      await streamed.consumeStream();
      assert.match(await streamed.text, /18 degrees, sunny/);
      assert.deepEqual(cities, ["Paris", "Paris"]);
    },
    async form() {
      const request = { ...asked, output: Output.object({ schema: Weather }), prompt: "How is the weather?" };
      const { output } = await generateText(request);
      assert.deepEqual(Weather.parse(output), output);
      const streamed = streamText(request);
      await streamed.consumeStream();
      assert.deepEqual(await streamed.output, output);
    },
    async picture() {
      const content = [{ type: "image", image: Buffer.from(picture, "base64"), mediaType: "image/png" }, { type: "text", text: colour }];
      const { text } = await generateText({ ...asked, model: provider("qwen2_vl"), messages: [{ role: "user", content }] });
      assert.equal(text, "The image is green.");
    },
    // The model thinks unless it is told not to; what it thought goes back with the next turn, by reference or as it is.
    async two_turns() {
      const messages = [{ role: "user", content: "My name is Bob." }];
      const first = await generateText({ ...asked, messages });
      assert.ok(first.text.length > 0);
      messages.push(...first.response.messages, { role: "user", content: "What is my name?" });
      assert.match((await generateText({ ...asked, messages })).text, /Bob/);
    },
  };
}

const all = {};
for (const [name, provider] of Object.entries(providers))
  for (const [scenario, body] of Object.entries(scenarios(provider))) all[`${name}.${scenario}`] = body;
for (const [name, embedder] of [["responses", openai.embedding("tiny_bert")], ["compatible", compatible.embeddingModel("tiny_bert")]])
  all[`${name}.embed`] = async () => {
    const { embeddings } = await embedMany({ model: embedder, maxRetries: 0, values: ["weather in Paris", "Count to 10."] });
    assert.equal(embeddings.length, 2);
    assert.ok(Math.abs(embeddings[0].reduce((sum, x) => sum + x * x, 0) - 1) < 1e-4);
  };
await run(all);
