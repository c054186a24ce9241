// Vercel's AI SDK, with its packages for OpenAI (which asks for responses) and for Anthropic.

import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { embedMany, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { BASE, FOX, MIA, MODEL, SUM, SUNNY, WEATHER, tell } from "./telling.mjs";

const openai = createOpenAI({ baseURL: `${BASE}/v1`, apiKey: "none" });
const anthropic = createAnthropic({ baseURL: `${BASE}/v1`, apiKey: "none" });
const MODELS = { responses: openai(MODEL), chat: openai.chat(MODEL), messages: anthropic(MODEL) };
const Person = z.object({ name: z.string(), age: z.number().int() });
const features = {};

for (const [kind, model] of Object.entries(MODELS)) {
  const asked = { model, temperature: 0, maxRetries: 0, maxOutputTokens: 300 };

  features[`${kind}_text`] = async () => {
    const answer = await generateText({ ...asked, prompt: SUM });
    return { text: answer.text, finish: answer.finishReason, tokens: answer.usage.totalTokens };
  };

  features[`${kind}_stream`] = async () => {
    const streamed = streamText({ ...asked, prompt: FOX });
    const pieces = [];
    for await (const piece of streamed.textStream) pieces.push(piece);
    const whole = await generateText({ ...asked, prompt: FOX });
    return {
      text: pieces.join(""),
      pieces: pieces.length,
      whole: whole.text,
      tokens: [(await streamed.usage).outputTokens],
    };
  };

  features[`${kind}_tool_loop`] = async () => {
    const cities = [];
    const get_weather = tool({
      description: "Get the weather in a city.",
      inputSchema: z.object({ city: z.string() }),
      execute: async ({ city }) => {
        cities.push(city);
        return SUNNY;
      },
    });
    const answer = await generateText({
      ...asked,
      prompt: WEATHER,
      tools: { get_weather },
      stopWhen: stepCountIs(3),
    });
    return { text: answer.text, cities };
  };

  features[`${kind}_output`] = async () => {
    const output = Output.object({ schema: Person });
    return (await generateText({ ...asked, output, prompt: MIA })).output;
  };
}

// A second turn refers to the first one's answer by its id, unless nothing is to be kept.
async function twoTurns(providerOptions) {
  const asked = { model: MODELS.responses, temperature: 0, maxRetries: 0, providerOptions };
  const messages = [{ role: "user", content: SUM }];
  const first = await generateText({ ...asked, messages });
  messages.push(...first.response.messages, { role: "user", content: FOX });
  return (await generateText({ ...asked, messages })).text;
}

features.two_turns = () => twoTurns(undefined);
features.two_turns_unkept = () => twoTurns({ openai: { store: false } });

features.embeddings = async () => {
  const values = ["A cat sleeps.", "A page is a run of KV slots."];
  const { embeddings } = await embedMany({ model: openai.embedding(MODEL), values, maxRetries: 0 });
  return embeddings.map((vector) => vector.length);
};

await tell(features);
